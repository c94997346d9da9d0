"""On a card: what it computes is what the CPU does. Skipped without one; ``pytest -m cuda``."""

import pytest
import torch

import tiny
from promptkd.divergences import reverse_kl
from promptkd.generation import decode_graph
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.kernels import attention, matmul, prepare
from promptkd.models.language_model import PADDING, LanguageModel, proven, select_responses
from promptkd.objectives import States, accumulate
from test_attention import each_alone, module_of, randn
from test_compiled import beside

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CARD = torch.device("cuda")


def both_kls(logprobs, tile):
    teacher, student = logprobs["teacher"], logprobs["student"]
    return {
        "adapt": reverse_kl(teacher, student.detach()),
        "learn": reverse_kl(student, teacher.detach()),
    }


def on(device, name, seed, learns=True):
    module = tiny.model(name, num_layers=2, seed=seed).requires_grad_(learns).to(device)
    prepare(module, device)
    return proven(LanguageModel(module, tiny.ROWS), name)


@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 2, 64), (4, 4, 128)])
def test_packed_sequences_attend_by_varlen_as_each_does_alone(heads, shared, width):
    """Within the rounding of bf16, of which a fp32 result has none."""
    lengths, counts = [70, 9, 1, 128], (heads, shared, shared)
    exact = [randn(sum(lengths), n, width, seed=n).requires_grad_() for n in counts]
    rows = [each.detach().to(CARD, torch.bfloat16).requires_grad_() for each in exact]
    packed = [each.transpose(0, 1)[None] for each in rows]
    assert attention._has_varlen(packed[1], packed[2])
    mask = torch.tensor(lengths).view(1, 1, 1, -1)
    mixed, _ = attention.grouped_sdpa(module_of(heads, shared), *packed, mask, scaling=0.1)
    expected = each_alone(*exact, lengths, 0.1)
    outer = randn(*expected.shape, seed=9)
    found = torch.autograd.grad(mixed[0], rows, outer.to(CARD, torch.bfloat16))
    truth = torch.autograd.grad(expected, exact, outer)

    for own, true in zip((mixed[0], *found), (expected, *truth), strict=True):
        assert (own.double().cpu() - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "gemma2"])
def test_a_step_of_promptkd_leaves_the_gradients_of_the_cpu(name):
    tokens = torch.randint(2, tiny.ROWS, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[1, 9:] = PADDING
    mask = (tokens != PADDING) & (torch.arange(12) > 4)
    found = []
    for device in (torch.device("cpu"), CARD):
        own, other = on(device, name, seed=1), on(device, name, seed=2, learns=False)
        prompt = torch.nn.Parameter(randn(4, tiny.WIDTH, seed=3, dtype=torch.float32).to(device))
        here, real = tokens.to(device), mask.to(device)
        states = {
            "student": States(select_responses(own.hidden_states(here), real), own.head, True),
            "teacher": States(
                select_responses(other.hidden_states(here, prompt), real), other.head, True
            ),
        }
        accumulate(states, both_kls, {"adapt": 0.1, "learn": 0.1})
        learnt = [prompt, *own.module.parameters()]
        found.append([each.grad.to_dense().cpu() for each in learnt])

    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weights_gradient_is_summed_in_fp32_in_one_product(dtype):
    """10,000 rows of 12,000: of slices, each product would be rounded to ``dtype`` first."""
    there = randn(12_000, 96, seed=1, dtype=torch.float32)
    gradient, states = randn(500, 10_000, seed=2).to(dtype), randn(500, 96, seed=3).to(dtype)
    sums = there.double()
    sums[:10_000] += gradient.double().T @ states.double()
    into = there.to(CARD)
    assert matmul._sums_in_fp32(into) == (torch.version.hip is None)
    matmul.add_outer(into[:10_000], gradient.to(CARD), states.to(CARD))

    assert (into.double().cpu() - sums).norm() < 1e-5 * sums.norm()
    assert torch.equal(into[10_000:].cpu(), there[10_000:])


def test_greedy_text_is_the_cpus():
    written = []
    for device in (torch.device("cpu"), CARD):
        engine = TransformersEngine(on(device, "llama", seed=1, learns=False), ())
        decoding = GenerationSettings(max_new_tokens=8, temperature=0.0)
        written.append(engine.generate([(5, 6, 7), (8, 9)], [(0, 0), (0, 1)], decoding))

    assert written[0] == written[1]


REQUESTS = [tuple(range(5, 5 + length)) for length in (9, 1, 4, 2, 7, 1, 5, 3)]
SEEDS = [(0, row) for row in range(len(REQUESTS))]
STOP = tuple(range(0, tiny.ROWS, 9))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_tokens_written_by_captured_steps_are_those_of_single_launches(monkeypatch, name):
    """Over extents of 8 columns, while rows are refilled and leave."""
    monkeypatch.setattr(decode_graph, "EXTENT", 8)
    model, written = on(CARD, name, seed=1, learns=False), []
    for compiled in (False, True):
        monkeypatch.setattr(decode_graph, "is_compiled", lambda module, given=compiled: given)
        assert decode_graph.fits(model) == compiled
        engine, decoding = TransformersEngine(model, STOP), GenerationSettings(20)
        written.append(engine.generate(REQUESTS, SEEDS, decoding, max_batch_tokens=90))

    assert written[0] == written[1]


def test_steps_are_captured_anew_when_weights_have_changed(monkeypatch):
    """The working copy of mixed precision lies somewhere else at every call."""
    monkeypatch.setattr(decode_graph, "is_compiled", lambda module: True)
    decoding = GenerationSettings(20, temperature=0.0)

    def engine_of(module):
        return TransformersEngine(LanguageModel(module, tiny.ROWS, torch.bfloat16), ())

    module, other = (tiny.model("llama", seed=seed).to(CARD) for seed in (1, 9))
    engine = engine_of(module)
    before = engine.generate(REQUESTS, SEEDS, decoding)
    module.load_state_dict(other.state_dict())
    after = engine.generate(REQUESTS, SEEDS, decoding)

    assert after == engine_of(other).generate(REQUESTS, SEEDS, decoding) != before


@pytest.mark.parametrize("case", ["promptkd", "with_student", "checkpointing"])
def test_compiled_kernels_leave_the_gradients_of_plain_ones(case):
    found = beside("inductor", "cuda", case)[case]

    assert found["nats"] < 1e-4
    assert found["moved"] < 1e-4
    assert found["compiled"][2] == 0
