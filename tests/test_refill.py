"""Rows whose responses have ended go to other requests, and nobody's text depends on it."""

import pytest
import torch

import tiny
from promptkd.adapters import Prefix
from promptkd.generation import decode_graph
from promptkd.generation.decoder import Decoder, Queue
from promptkd.generation.kv_cache import is_plain
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.slots import Slots
from promptkd.generation.transformers_engine import CoGenerator, TransformersEngine
from promptkd.kernels.matmul import GenerationMatmuls
from promptkd.teachers import prompt_vectors
from test_architectures import language_model

LENGTHS = (9, 1, 4, 2, 7, 1, 5, 3, 6, 2, 8)
REQUESTS = [
    tuple(2 + (31 * row + 17 * place) % 100 for place in range(length))
    for row, length in enumerate(LENGTHS)
]
TOLD = [(44, 22, 90)[: row % 4] + request for row, request in enumerate(reversed(REQUESTS))]
SEEDS = [(3, row) for row in range(len(REQUESTS))]
STOP = tuple(range(0, tiny.ROWS, 9))
NEW = 14
KINDS = ("nothing", "soft prompt", "prefix", "co-generator", "blocked n-grams")


def tiny_model(name, seed=1, **options):
    if name in tiny.ARCHITECTURES:
        return tiny.language_model(tiny.model(name, seed=seed, **options))
    return language_model(name)


def options_of(kind, model, name):
    match kind:
        case "soft prompt":
            return {"soft_prompt": prompt_vectors(model, (44, 22, 90))}
        case "prefix":
            return {"prefix": Prefix(length=5).build(model, tiny.tokenizer())}
        case "co-generator":
            other = tiny_model(name, 2, num_layers=3)
            return {"co_generator": CoGenerator(other, 0.4, tuple(TOLD))}
    return {}


def decoding_of(kind, temperature):
    blocked = 2 if kind == "blocked n-grams" else 0
    return GenerationSettings(NEW, temperature=temperature, no_repeat_ngram_size=blocked)


def of_row(options, row):
    """The same, for one request."""
    if "co_generator" not in options:
        return options
    both = options["co_generator"]
    return {"co_generator": CoGenerator(both.model, both.share, (both.requests[row],))}


def expect_each_as_alone(model, decoding, options, budgets, stop=STOP):
    """Token by token; of two models' logprobs up to rounding."""
    engine = TransformersEngine(model, stop)
    alone = [
        engine.generate([request], [seed], decoding, **of_row(options, row))[0]
        for row, (request, seed) in enumerate(zip(REQUESTS, SEEDS, strict=True))
    ]
    assert len({len(response.token_ids) for response in alone}) > 3
    for budget in budgets:
        together = engine.generate(REQUESTS, SEEDS, decoding, max_batch_tokens=budget, **options)
        assert [r.token_ids for r in together] == [r.token_ids for r in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.annotations().keys() == other.annotations().keys()
            for name, values in one.annotations().items():
                assert values == pytest.approx(other.annotations()[name], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_written_does_not_depend_on_the_rows_written_at_once(name, kind, temperature):
    model = tiny_model(name)
    options = options_of(kind, model, name)
    expect_each_as_alone(model, decoding_of(kind, temperature), options, (1, 100))


def test_so_it_is_where_columns_run_out():
    model, longest = tiny_model("gpt2"), max(LENGTHS) + 40
    budgets = 3 * longest, 4 * longest
    expect_each_as_alone(model, GenerationSettings(40), {}, budgets, stop=STOP[:2])


def test_a_row_that_waits_has_no_position_beyond_the_longest_text():
    """GPT-2 has no vector for it, and raises an error."""
    model = tiny_model("gpt2", n_positions=9 + 6)
    queue = Queue([REQUESTS[0], (5,), (6,)], num_rows=2, room=6)
    writing = Decoder(model, GenerationMatmuls(), queue)
    with torch.no_grad():
        scores = writing.start()
        for time in range(12):
            writing.read(scores.argmax(-1))
            if time == 0:
                writing.release([0])
            if time == 6:
                writing.release([0, 1])
                writing.refill([1])
            scores = writing.step()

    assert scores.isfinite().all()


@pytest.mark.parametrize(
    "name", ["opt", "qwen3", "falcon (ALiBi)", "bloom", "mpt", "deepseek_v3", "qwen3_moe"]
)
def test_so_it_is_however_positions_are_counted_and_layers_are_made(name):
    model = tiny_model(name)
    assert is_plain(model.module)
    options = options_of("soft prompt", model, name)
    expect_each_as_alone(model, decoding_of("soft prompt", 1.0), options, (80,))


@pytest.mark.parametrize("name", ["gemma3_text", "lfm2", "qwen3_5_text"])
def test_caches_that_forget_are_written_group_by_group(name):
    model = tiny_model(name)
    assert not is_plain(model.module)
    expect_each_as_alone(model, decoding_of("nothing", 1.0), {}, (80,))


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_steps_of_fixed_shapes_write_the_same(monkeypatch, name, kind):
    """Over extents of 8 columns, as on a card over 256; there each is captured."""
    model = tiny_model(name)
    decoding, options = decoding_of(kind, 1.0), options_of(kind, model, name)
    engine = TransformersEngine(model, STOP)
    written = [engine.generate(REQUESTS, SEEDS, decoding, max_batch_tokens=100, **options)]
    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(decode_graph, "is_compiled", lambda module: True)
    monkeypatch.setattr(decode_graph, "EXTENT", 8)
    assert decode_graph.fits(model)
    written.append(engine.generate(REQUESTS, SEEDS, decoding, max_batch_tokens=100, **options))
    growing, fixed = ([response.token_ids for response in each] for each in written)
    assert fixed == growing


def test_a_row_does_not_wait_for_the_longest():
    """A step for each token of the longest response of each group is what waiting would take."""
    model, steps = tiny_model("llama"), []
    engine, decoding = TransformersEngine(model, STOP), GenerationSettings(NEW)
    model.module.base_model.register_forward_hook(lambda *_: steps.append(1))
    written = engine.generate(REQUESTS * 3, [*zip(range(33))], decoding, max_batch_tokens=92)
    lengths = [len(response.token_ids) for response in written]
    order = sorted(range(33), key=lambda row: -len((REQUESTS * 3)[row]))
    rows = 92 // (max(LENGTHS) + NEW)
    waiting = sum(
        max(lengths[row] for row in order[start : start + rows]) for start in range(0, 33, rows)
    )
    assert sum(lengths) / rows < len(steps) < 0.85 * waiting


def test_a_quarter_of_the_rows_is_refilled_at_once_or_all_that_wait():
    slots = Slots(11, 8, max_new_tokens=5, stop=(0,))
    assert slots.append([1, 0, 1, 1, 1, 1, 1, 1]) == [1]
    assert slots.refill() == []
    assert slots.append([1, 1, 1, 0, 1, 1, 1, 1]) == [3]
    assert slots.refill() == [1, 3]
    assert slots.requests == [0, 8, 2, 9, 4, 5, 6, 7]
    assert slots.append([1, 1, 1, 1, 1, 1, 1, 0]) == [7]
    assert slots.refill() == [7]
    assert slots.leave(0.75) == []
    assert slots.append([0, 0, 1, 1, 1, 1, 1, 1]) == [0, 1]
    assert slots.leave(0.75) == [2, 3, 4, 5, 6, 7]
    assert slots.requests == [2, 9, 4, 5, 6, 10]
    assert slots.token_ids[8] == [1, 0]
