"""Every method's loss against a loop of its own, written from the papers' formulas in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import tiny
from promptkd.data import Batch, EncodedExample
from promptkd.divergences import reverse_kl
from promptkd.methods import build_method
from promptkd.models.language_model import LanguageModel
from promptkd.objectives import Divergence, PolicyGradient, SampledToken, TokenView
from promptkd.rollouts import Generators, Mixture, Rollout, Student, TeacherMixed
from promptkd.teachers import Interpolated

TOKENS, VOCABULARY = 5, 7


def logits(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (TOKENS, VOCABULARY)), generator=generator, dtype=torch.float64)


STUDENT, TEACHER = logits(1), logits(2)
WRITTEN = torch.tensor([3, 0, 6, 2, 2])
SAMPLING = STUDENT.log_softmax(-1)[range(TOKENS), WRITTEN] + torch.tensor(
    [0.0, 0.5, -0.5, 0.1, -0.1]
)
NOTES = {
    "sampling_logprobs": SAMPLING,
    "advantages": torch.tensor([0.7, -1.3, 0.4, -0.2, 0.9], dtype=torch.float64),
}


def softmax(row):
    """Probabilities of one row of logits, as a list of scalars that carry gradient."""
    exponentials = [value.exp() for value in row]
    return [value / sum(exponentials) for value in exponentials]


def fkl(p, q):
    return sum(p_v * (p_v / q_v).log() for p_v, q_v in zip(p, q, strict=True))


def mixture(a, b, share):
    return [share * a_v + (1 - share) * b_v for a_v, b_v in zip(a, b, strict=True)]


def jsd(p, q, beta):
    m = mixture(p, q, beta)
    return beta * fkl(p, m) + (1 - beta) * fkl(q, m)


def akl(p, q, head_mass):
    order = sorted(range(VOCABULARY), key=lambda v: -p[v].item())
    head, mass = [], 0.0
    for v in order:
        if mass >= head_mass:
            break
        head.append(v)
        mass += p[v].item()
    gaps = [abs(p_v.item() - q_v.item()) for p_v, q_v in zip(p, q, strict=True)]
    weight = sum(gaps[v] for v in head) / sum(gaps)
    return weight * fkl(p, q) + (1 - weight) * fkl(q, p)


def alpha_beta(p, q, alpha, beta):
    both = alpha + beta
    return -sum(
        a**alpha * b**beta - alpha / both * a**both - beta / both * b**both
        for a, b in zip(p, q, strict=True)
    ) / (alpha * beta)


def clipped_policy_gradient(q_y, sampling_probability, advantage, clip):
    ratio = q_y / sampling_probability
    bounded = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, bounded * advantage)


def naive(formula):
    """The loss of each token, from probabilities; ``formula(q, p, y, t)``."""

    def losses(z_q, z_p):
        return torch.stack(
            [formula(softmax(z_q[t]), softmax(z_p[t]), WRITTEN[t].item(), t) for t in range(TOKENS)]
        )

    return losses


def minillm_token(q, p, y, t, clip=0.2):
    later = clipped_policy_gradient(q[y], SAMPLING[t].exp(), NOTES["advantages"][t].item(), clip)
    return fkl(q, p) + later


def opd_token(q, p, y, t):
    advantage = math.log(p[y].item()) - math.log(q[y].item())
    return -(q[y] / q[y].item()) * advantage


CASES = {
    "sft": ({}, 0, lambda q, p, y, t: -q[y].log()),
    "kd": ({}, 0, lambda q, p, y, t: -0.5 * q[y].log() + 0.5 * fkl(p, q)),
    "kd kl_share=1": ({"kl_share": 1.0}, 0, lambda q, p, y, t: fkl(p, q)),
    "seqkd": ({}, 0, lambda q, p, y, t: -q[y].log()),
    "seqkd soft": ({"kl_share": 0.5}, 0, lambda q, p, y, t: -0.5 * q[y].log() + 0.5 * fkl(p, q)),
    "imitkd": ({}, 0, lambda q, p, y, t: fkl(p, q)),
    "gkd": ({}, 0, lambda q, p, y, t: fkl(q, p)),
    "gkd jsd": (
        {"student_share": 0.5, "divergence": "generalized_jsd", "beta": 0.1},
        0,
        lambda q, p, y, t: jsd(p, q, 0.1),
    ),
    "minillm": ({}, 0, minillm_token),
    "minillm clip": ({"clip": 0.05}, 0, lambda q, p, y, t: minillm_token(q, p, y, t, 0.05)),
    "distillm": ({}, 0, lambda q, p, y, t: fkl(p, mixture(p, q, 0.1))),
    "distillm srkl": (
        {"divergence": "skew_reverse_kl", "skew": 0.2},
        0,
        lambda q, p, y, t: fkl(q, mixture(q, p, 0.2)),
    ),
    "distillm2 of the teacher": ({}, 0, lambda q, p, y, t: fkl(p, mixture(p, q, 0.1))),
    "distillm2 of the student": ({}, 1, lambda q, p, y, t: fkl(q, mixture(q, p, 0.1))),
    "akl": ({}, 0, lambda q, p, y, t: akl(p, q, 0.5)),
    "akl head": ({"head_mass": 0.8}, 0, lambda q, p, y, t: akl(p, q, 0.8)),
    "abkd": ({}, 0, lambda q, p, y, t: alpha_beta(p, q, 0.2, 0.7)),
    "abkd others": (
        {"alpha": 0.5, "beta": 1.0, "rollouts": "student"},
        0,
        lambda q, p, y, t: alpha_beta(p, q, 0.5, 1.0),
    ),
    "opd": ({}, 0, opd_token),
    "promptkd": ({}, 0, lambda q, p, y, t: fkl(q, p)),
    "promptkd srkl": (
        {"divergence": "skew_reverse_kl", "skew": 0.1},
        0,
        lambda q, p, y, t: fkl(q, mixture(q, p, 0.1)),
    ),
}


def with_gradient(function, z):
    z = z.clone().requires_grad_(True)
    values = function(z)
    values.sum().backward()
    return values.detach(), z.grad


@pytest.mark.parametrize("case", CASES)
def test_a_loss_and_its_gradient_are_those_of_the_formula(case):
    options, term, formula = CASES[case]
    objective = build_method(case.split()[0], **options).terms[term].objective

    def ours(z):
        view = TokenView(z.log_softmax(-1), TEACHER.log_softmax(-1), WRITTEN, NOTES)
        return objective(view)

    values, gradient = with_gradient(ours, STUDENT)
    expected, expected_gradient = with_gradient(lambda z: naive(formula)(z, TEACHER), STUDENT)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", ["gkd", "promptkd"])
def test_a_share_of_sft_is_a_term_of_its_own_on_the_references(name):
    own, given = build_method(name, sft_share=0.25).terms
    assert own.objective == build_method(name).terms[0].objective
    assert (own.rollouts, own.weight) == (Student(), 0.75)
    assert given == replace(build_method("sft").terms[0], weight=0.25)


def test_promptkd_half_is_promptkd_on_a_text_that_is_the_references_every_other_time():
    half, whole = build_method("promptkd_half"), build_method("promptkd")
    assert half.terms == (replace(whole.terms[0], rollouts=Mixture(0.5)),)
    assert (half.teacher, half.adaptation) == (whole.teacher, whole.adaptation)


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_taid_is_the_kl_to_the_mixture_of_logits(share):
    method = build_method("taid", start=share)
    assert method.teacher is not None
    target = method.teacher.build(LanguageModel(tiny.model("gpt2"), tiny.ROWS), None).target

    def ours(z):
        q = z.log_softmax(-1)
        p = target(q.detach(), TEACHER.log_softmax(-1))
        return method.terms[0].objective(TokenView(q, p, WRITTEN))

    def expected(z):
        mixed = (1 - share) * z.detach() + share * TEACHER  # of logits, as in the paper
        return torch.stack([fkl(softmax(mixed[t]), softmax(z[t])) for t in range(TOKENS)])

    values, gradient = with_gradient(ours, STUDENT)
    naive_values, naive_gradient = with_gradient(expected, STUDENT)
    torch.testing.assert_close(values, naive_values)
    torch.testing.assert_close(gradient, naive_gradient)


def test_taid_with_the_whole_teacher_is_the_forward_kl():
    teacher = Interpolated(1.0, 1.0).build(LanguageModel(tiny.model("gpt2"), tiny.ROWS), None)
    q, p = STUDENT.log_softmax(-1), TEACHER.log_softmax(-1)
    target = teacher.target(q, p)
    torch.testing.assert_close(
        Divergence("forward_kl").between(q, target), (p.exp() * (p - q)).sum(-1)
    )


def test_taid_follows_the_adaptive_rule_of_the_paper():
    teacher = Interpolated().build(LanguageModel(tiny.model("gpt2"), tiny.ROWS), None)
    losses = [2.0, 1.0, 1.5, 0.1, 0.1]
    shares = []
    for k, loss in enumerate(losses, 1):
        teacher.observe(loss, k / 100)
        shares.append(teacher.state_dict()["share"])
    t, m, expected = 0.4, 0.0, []
    for k, loss in enumerate(losses):
        if k > 0:
            m = 0.99 * m + 0.01 * (losses[k - 1] - loss) / losses[k - 1]
        step = 5e-4 * (1 / (1 + math.exp(-m))) * (1 - t)
        t = min(1.0, max(0.4 + 0.6 * (k + 1) / 100, t + step))
        expected.append(t)
    assert shares == pytest.approx(expected, abs=1e-12)


def test_taid_ends_at_the_teacher_and_never_walks_back():
    teacher = Interpolated().build(LanguageModel(tiny.model("gpt2"), tiny.ROWS), None)
    generator = torch.Generator().manual_seed(0)
    shares = [0.4]
    for k in range(1, 51):
        teacher.observe(torch.rand((), generator=generator).item(), k / 50)
        shares.append(teacher.state_dict()["share"])
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_taid_pushes_beyond_the_line_when_the_loss_falls_fast():
    slow, fast = (
        Interpolated(step_size=0.5).build(LanguageModel(tiny.model("gpt2"), tiny.ROWS), None)
        for _ in range(2)
    )
    for k in range(1, 6):
        slow.observe(1.0, k / 1000)
        fast.observe(2.0**-k, k / 1000)
    assert fast.state_dict()["share"] > slow.state_dict()["share"] > 0.4 + 0.6 * 5 / 1000


def test_taids_state_brings_back_the_whole_rule():
    first, second = (
        Interpolated(step_size=0.1).build(LanguageModel(tiny.model("gpt2"), tiny.ROWS), None)
        for _ in range(2)
    )
    for k, loss in enumerate((9.0, 1.0, 0.2), 1):
        first.observe(loss, k / 1000)
    second.load_state_dict(first.state_dict())
    for k, loss in enumerate((3.0, 0.1), 4):
        first.observe(loss, k / 1000)
        second.observe(loss, k / 1000)
    assert second.state_dict() == first.state_dict()


def test_opd_averaged_over_the_students_tokens_is_the_reverse_kl():
    z = STUDENT[0].clone().requires_grad_(True)
    q, p = z.log_softmax(-1), TEACHER[0].log_softmax(-1)
    every = torch.arange(VOCABULARY)
    view = TokenView(q.expand(VOCABULARY, -1), p.expand(VOCABULARY, -1), every)
    losses = SampledToken()(view)
    whole = reverse_kl(q[None], p[None])[0]
    torch.testing.assert_close((q.detach().exp() * losses).sum(), whole)
    (gradient,) = torch.autograd.grad((q.detach().exp() * losses).sum(), z, retain_graph=True)
    (expected,) = torch.autograd.grad(whole, z)
    torch.testing.assert_close(gradient, expected)


def test_one_sampled_token_pushes_by_its_log_ratio():
    z = STUDENT[:1].clone().requires_grad_(True)
    q, p = z.log_softmax(-1), TEACHER[:1].log_softmax(-1)
    SampledToken()(TokenView(q, p, torch.tensor([4]))).sum().backward()
    one_hot = torch.eye(VOCABULARY, dtype=torch.float64)[4]
    advantage = (p - q).detach()[0, 4]
    torch.testing.assert_close(z.grad[0], -advantage * (one_hot - q.detach()[0].exp()))


def test_minillms_one_step_part_has_the_gradient_of_the_reverse_kl():
    """q_v (log(q_v / p_v) - KL), where the advantages are zero."""
    objective = build_method("minillm").terms[0].objective
    notes = {**NOTES, "advantages": torch.zeros(TOKENS, dtype=torch.float64)}
    z = STUDENT.clone().requires_grad_(True)
    p = TEACHER.log_softmax(-1)
    objective(TokenView(z.log_softmax(-1), p, WRITTEN, notes)).sum().backward()
    q = STUDENT.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1, keepdim=True)
    torch.testing.assert_close(z.grad, q.exp() * (q - p - kl))


def test_policy_gradient_stops_where_the_ratio_left_the_clip_in_the_advantages_direction():
    objective = PolicyGradient(0.2)
    for advantage, log_ratio, moves in [
        (1.0, math.log(1.5), False),
        (1.0, math.log(0.5), True),
        (-1.0, math.log(1.5), True),
        (-1.0, math.log(0.5), False),
        (1.0, 0.0, True),
    ]:
        z = STUDENT[:1].clone().requires_grad_(True)
        q = z.log_softmax(-1)
        notes = {
            "sampling_logprobs": (q.detach()[0, 2] - log_ratio)[None],
            "advantages": torch.tensor([advantage], dtype=torch.float64),
        }
        objective(TokenView(q, None, torch.tensor([2]), notes)).sum().backward()
        assert (z.grad.abs().sum() > 0) == moves, (advantage, log_ratio)


def generators(write=None, mixed=None, step=0, max_steps=10, seed=0):
    def nobody(*arguments):
        raise AssertionError("this writer was not expected to be asked")

    return Generators(
        write or nobody,
        nobody,
        mixed or nobody,
        step / max_steps,
        seed,
        step,
        lambda text: tuple(map(ord, text)),
    )


def test_minillm_is_unbiased_for_the_reverse_kl_of_responses_of_two_tokens():
    """With one token to come, the mean of what follows is its sum: nothing is left out.

    Averaged over every response y ~ q, weighted by its probability, the gradient of the summed
    token losses is the gradient of sum_y q(y) log q(y) / p(y), score function and all.
    """
    size = 3
    z = [logits(3, size), logits(4, size, size)]
    teacher = [logits(5, size).log_softmax(-1), logits(6, size, size).log_softmax(-1)]
    for part in z:
        part.requires_grad_(True)
    objective = build_method("minillm", teacher_share=0.0).terms[0].objective

    def student():
        return z[0].log_softmax(-1), z[1].log_softmax(-1)

    exact, estimate = 0.0, 0.0
    for y in itertools.product(range(size), repeat=2):
        q1, q2 = student()
        own = torch.stack([q1[y[0]], q2[y[0], y[1]]])
        others = torch.stack([teacher[0][y[0]], teacher[1][y[0], y[1]]])
        exact = exact + own.sum().exp() * (own - others).sum()

        def mixed(examples, share, y=y, own=own, others=others):
            notes = {
                "student_logprobs": tuple(own.tolist()),
                "teacher_logprobs": tuple(others.tolist()),
                "sampling_logprobs": tuple(own.tolist()),
            }
            return [Rollout(0, (0,), y, "mixed", notes)]

        example = EncodedExample(0, (0,), None, ())
        (rollout,) = TeacherMixed(0.0).generate(Batch((example,)), generators(mixed=mixed), {})
        notes = {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in rollout.annotations.items()
        }
        view = TokenView(
            torch.stack([q1, q2[y[0]]]),
            torch.stack([teacher[0], teacher[1][y[0]]]),
            torch.tensor(y),
            notes,
        )
        estimate = estimate + own.sum().exp().detach() * objective(view).sum()
    expected = torch.autograd.grad(exact, z, retain_graph=True)
    for gradient, other in zip(torch.autograd.grad(estimate, z), expected, strict=True):
        torch.testing.assert_close(gradient, other)
