"""Chunked losses and gradients equal plain autograd on whole logits, in bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from promptkd.divergences import DIVERGENCES, forward_kl, reverse_kl
from promptkd.models.language_model import Head, select_responses
from promptkd.objectives import (
    CrossEntropy,
    Divergence,
    States,
    Tiling,
    TokenView,
    Weighted,
    accumulate,
    options_of,
)
from promptkd.teachers import SoftPromptTeacher, prompt_vectors

TILINGS = (  # tokens per chunk and tile: 1 and 1, 3 and 2, 7 and 3, all and all
    Tiling(1, 1),
    Tiling(3 * tiny.ROWS, 2 * tiny.ROWS),
    Tiling(7 * tiny.ROWS + 5, 3 * tiny.ROWS),
    Tiling(10**7, 10**7),
)
WEIGHTS = {"student": 0.05, "towards_student": 0.07, "towards_itself": 0.02}


def batch():
    tokens = torch.randint(2, 98, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 14, dtype=torch.bool)
    for row, (start, end) in enumerate([(3, 14), (6, 7), (1, 9)]):
        mask[row, start:end] = True
    return tokens, mask


def losses(logprobs, piece):
    q, told = logprobs["student"], logprobs["teacher"]
    return {
        "student": reverse_kl(q, told.detach()),
        "towards_student": reverse_kl(told, q.detach()),
        "towards_itself": reverse_kl(told, logprobs["plain"]),
    }


def whole_logprobs(module, tokens, mask, vectors=None):
    """By the model's own forward; the row before each response token is picked in a loop."""
    embeddings = module.get_input_embeddings()(tokens)
    front = 0
    if vectors is not None:
        front = len(vectors)
        embeddings = torch.cat([vectors.expand(len(tokens), -1, -1), embeddings], dim=1)
    logits = module(inputs_embeds=embeddings).logits
    places = [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t]]
    rows = torch.stack([logits[b, front + t - 1, : tiny.ROWS] for b, t in places])
    return rows.log_softmax(-1)


def players(student_architecture, teacher_architecture, **student_options):
    student = tiny.model(student_architecture, seed=1, **student_options)
    module = tiny.model(teacher_architecture, num_layers=3, rows=128, width=48, seed=2)
    model = tiny.language_model(module.requires_grad_(False), tiny.ROWS)
    vectors = prompt_vectors(model, [40, 50, 60])
    return tiny.language_model(student, tiny.ROWS), SoftPromptTeacher(
        model, vectors, trainable=True
    )


def states_of(student, teacher, tokens, mask):
    with torch.no_grad():
        plain = select_responses(teacher.plain_hidden_states(tokens), mask)
    head = teacher.model.head
    return {
        "student": States(
            select_responses(student.hidden_states(tokens), mask), student.head, True
        ),
        "teacher": States(select_responses(teacher.hidden_states(tokens), mask), head, True),
        "plain": States(plain, head, False),
    }


def gradients_of(student, teacher):
    found = {n: p.grad.clone() for n, p in student.module.named_parameters()}
    found["soft_prompt"] = teacher.soft_prompt.grad.clone()
    student.module.zero_grad()
    teacher.soft_prompt.grad = None
    return found


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    scale = max(e.norm() for e in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * max(value.norm(), 1e-2 * scale), name


@pytest.mark.parametrize(
    ("student_architecture", "teacher_architecture", "options"),
    [
        ("gpt2", "llama", {}),
        ("llama", "gpt2", {}),
        ("llama", "llama", {"tie_word_embeddings": True}),
        ("gemma2", "gemma2", {}),
        ("gemma2", "opt", {"tie_word_embeddings": False}),
        ("opt", "gemma2", {}),
    ],
)
def test_every_tiling_equals_autograd_on_whole_logits(
    student_architecture, teacher_architecture, options
):
    student, teacher = players(student_architecture, teacher_architecture, **options)
    tokens, mask = batch()
    expected_nats = losses(
        {
            "student": whole_logprobs(student.module, tokens, mask),
            "teacher": whole_logprobs(teacher.model.module, tokens, mask, teacher.soft_prompt),
            "plain": whole_logprobs(teacher.model.module, tokens, mask),
        },
        slice(0, 20),
    )
    sum(WEIGHTS[name] * nats.sum() for name, nats in expected_nats.items()).backward()
    expected = gradients_of(student, teacher)
    for tiling in TILINGS:
        states = states_of(student, teacher, tokens, mask)
        nats = accumulate(states, losses, WEIGHTS, tiling)
        for name, values in nats.items():
            assert not values.requires_grad
            torch.testing.assert_close(values, expected_nats[name].detach(), rtol=1e-4, atol=1e-5)
        assert_same(gradients_of(student, teacher), expected)
    assert all(p.grad is None for p in teacher.model.module.parameters())


def test_both_adaptation_losses_in_one_pass_equal_two_passes():
    student, teacher = players("llama", "llama")
    tokens, mask = batch()

    def only(name):
        states = states_of(student, teacher, tokens, mask)
        states["student"] = States(states["student"].hidden.detach(), student.head, False)
        names = ["towards_student", "towards_itself"] if name == "both" else [name]
        accumulate(
            states,
            lambda *args: {n: losses(*args)[n] for n in names},
            WEIGHTS,
            Tiling(4 * tiny.ROWS, 3 * tiny.ROWS),
        )
        gradient = teacher.soft_prompt.grad.clone()
        teacher.soft_prompt.grad = None
        return gradient

    together = only("both")
    apart = only("towards_student") + only("towards_itself")
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5 * apart.abs().max().item())


def test_gradients_are_added_to_those_already_there():
    student, teacher = players("gpt2", "gpt2")
    tokens, mask = batch()
    accumulate(states_of(student, teacher, tokens, mask), losses, WEIGHTS)
    once = gradients_of(student, teacher)
    for _ in range(2):
        accumulate(states_of(student, teacher, tokens, mask), losses, WEIGHTS)
    twice = gradients_of(student, teacher)
    assert_same(twice, {name: 2 * gradient for name, gradient in once.items()})


def test_a_model_that_does_not_learn_gets_no_gradient():
    student, teacher = players("gpt2", "gpt2")
    tokens, mask = batch()
    states = states_of(student, teacher, tokens, mask)
    states["student"] = States(states["student"].hidden, student.head, False)
    accumulate(states, losses, WEIGHTS, Tiling(4 * tiny.ROWS, 3 * tiny.ROWS))
    assert all(p.grad is None for p in student.module.parameters())
    assert teacher.soft_prompt.grad is not None


@pytest.mark.parametrize("tiling", [Tiling(1, 1), Tiling(3 * 9, 2 * 9), Tiling(10**6, 10**6)])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(True, 1.0, None), (True, 0.3, None), (True, 2.0, 1.5)]
)
def test_head_with_bias_scale_and_soft_cap_equals_autograd(bias, scale, softcap, tiling):
    torch.manual_seed(0)
    trunk = torch.randn(5, 6, requires_grad=True)
    inputs, target = torch.randn(8, 5), (2 * torch.randn(8, 9)).log_softmax(-1)
    weight, offset = torch.randn(12, 6, requires_grad=True), torch.randn(12, requires_grad=True)

    logits = (inputs @ trunk @ weight[:9].T + offset[:9]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    (forward_kl(logits.log_softmax(-1), target).sum() / 8).backward()
    expected = [p.grad.clone() for p in (trunk, weight, offset)]
    trunk.grad = weight.grad = offset.grad = None

    head = Head(weight, offset, 9, scale, softcap)
    accumulate(
        {"student": States(inputs @ trunk, head, True)},
        lambda logprobs, piece: {"student": forward_kl(logprobs["student"], target[piece])},
        {"student": 1 / 8},
        tiling,
    )
    for parameter, gradient in zip((trunk, weight, offset), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.grad[9:], torch.zeros(3, 6))


def test_master_weights_are_multiplied_in_bf16_and_their_gradients_summed_in_fp32():
    torch.manual_seed(0)
    inputs, target = torch.randn(40, 16), torch.randn(40, 64).log_softmax(-1)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        trunk, weight = (torch.randn(rows, 16, requires_grad=True) for rows in (16, 64))
        accumulate(
            {"student": States(inputs @ trunk, Head(weight, None, 64, dtype=dtype), True)},
            lambda logprobs, piece: {"student": forward_kl(logprobs["student"], target[piece])},
            {"student": 1 / 40},
            Tiling(8 * 64, 4 * 64),
        )
        gradients.append((trunk.grad, weight.grad))

    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.02


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries that any operation's result had."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.entries = max(self.entries, leaf.numel())
        return result


@pytest.mark.parametrize("chunk_tokens", [20, 50])
def test_no_tensor_is_larger_than_a_chunk_of_the_vocabulary(chunk_tokens):
    num_tokens, vocabulary, width = 400, 3001, 16
    torch.manual_seed(0)
    trunk = torch.randn(width, width, requires_grad=True)
    inputs = torch.randn(num_tokens, width)
    head = Head(torch.randn(vocabulary, width, requires_grad=True), None, vocabulary)
    plain = States(torch.randn(num_tokens, width), head, False)

    def largest(tokens):
        states = {
            "student": States(inputs @ trunk, head, True),
            "teacher": States(inputs @ trunk, head, True),
            "plain": plain,
        }
        with LargestTensor() as seen:
            accumulate(states, losses, WEIGHTS, Tiling(tokens * vocabulary, 10 * vocabulary))
        return seen.entries

    assert largest(chunk_tokens) == chunk_tokens * vocabulary
    assert largest(num_tokens) == num_tokens * vocabulary


def view():
    student = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    teacher = torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]).log()
    return TokenView(student, teacher, torch.tensor([2, 1]))


def test_token_view_reads_both_models_at_the_tokens_written():
    torch.testing.assert_close(view().student_at_tokens.exp(), torch.tensor([0.25, 0.8]))
    torch.testing.assert_close(view().target_at_tokens.exp(), torch.tensor([0.6, 0.3]))


def test_cross_entropy_is_minus_the_log_probability_of_the_token():
    expected = -torch.tensor([0.25, 0.8]).log()
    torch.testing.assert_close(CrossEntropy()(view()), expected)
    assert not CrossEntropy().needs_teacher


def test_weighted_objective_is_the_weighted_sum_of_its_parts():
    objective = Weighted(((0.25, CrossEntropy()), (2.0, Divergence("forward_kl"))))
    student, teacher = view().student, view().target
    expected = 0.25 * CrossEntropy()(view()) + 2.0 * forward_kl(student, teacher)
    torch.testing.assert_close(objective(view()), expected)
    assert objective.needs_teacher


def test_divergence_passes_its_options_on():
    plain = Divergence("skew_forward_kl", options_of(skew=0.0, beta=None))
    torch.testing.assert_close(plain(view()), forward_kl(view().student, view().target))


def test_unknown_divergence_or_wrong_option_is_refused_when_built():
    with pytest.raises(ValueError, match="'backward_kl'; did you mean 'forward_kl'"):
        Divergence("backward_kl")
    with pytest.raises(ValueError, match="beta is 1"):
        Divergence("generalized_jsd", (("beta", 1.0),))
    with pytest.raises(ValueError, match="takes no options, but 'beta' is given"):
        Divergence("reverse_kl", (("beta", 0.5),))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_host_waits_for_no_tile(name):
    """Tensors on the meta device have no numbers: reading one, as a host does, raises."""
    between = DIVERGENCES[name]
    weight = torch.nn.Parameter(torch.empty(tiny.ROWS, 8, device="meta"))
    states = {
        who: States(
            torch.empty(7, 8, device="meta", requires_grad=True),
            Head(weight, None, tiny.ROWS),
            True,
        )
        for who in ("student", "teacher")
    }

    def both(logprobs, tile):
        q, p = logprobs["student"], logprobs["teacher"]
        return {"student": between(q, p.detach()), "towards_student": between(p, q.detach())}

    found = accumulate(states, both, WEIGHTS, Tiling(3 * tiny.ROWS, 2 * tiny.ROWS))
    assert {value.shape for value in found.values()} == {(7,)}
