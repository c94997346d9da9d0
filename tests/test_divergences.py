"""The divergences are what their formulas say: values, limits, bounds and gradients, in float64."""

import math

import pytest
import torch

from promptkd.divergences import (
    DIVERGENCES,
    alpha_beta,
    forward_kl,
    generalized_jsd,
    kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

VOCABULARY = 11


def logprobs(seed, rows=6, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def naive_kl(first, second):
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True) if a > 0)


def mix(first, second, share):
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def naive_adaptive_kl(q, p, head_mass=0.5):
    order = sorted(range(len(p)), key=lambda v: -p[v])
    mass, head = 0.0, set()
    for v in order:
        if mass < head_mass:
            head.add(v)
        mass += p[v]
    head_gap = sum(abs(p[v] - q[v]) for v in head)
    tail_gap = sum(abs(p[v] - q[v]) for v in range(len(p)) if v not in head)
    weight = head_gap / (head_gap + tail_gap)
    return weight * naive_kl(p, q) + (1 - weight) * naive_kl(q, p)


def naive_jsd(q, p, beta):
    m = mix(p, q, beta)
    return beta * naive_kl(p, m) + (1 - beta) * naive_kl(q, m)


def naive_alpha_beta(q, p, alpha=0.2, beta=0.7):
    both = alpha + beta
    return -sum(
        a**alpha * b**beta - alpha / both * a**both - beta / both * b**both
        for a, b in zip(p, q, strict=True)
    ) / (alpha * beta)


NAIVE = {
    "forward_kl": lambda q, p: naive_kl(p, q),
    "reverse_kl": lambda q, p: naive_kl(q, p),
    "generalized_jsd": lambda q, p, beta=0.5: naive_jsd(q, p, beta),
    "skew_forward_kl": lambda q, p, skew=0.1: naive_kl(p, mix(p, q, skew)),
    "skew_reverse_kl": lambda q, p, skew=0.1: naive_kl(q, mix(q, p, skew)),
    "total_variation": lambda q, p: sum(abs(a - b) for a, b in zip(q, p, strict=True)) / 2,
    "adaptive_kl": naive_adaptive_kl,
    "alpha_beta": naive_alpha_beta,
}
OPTIONS = [
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 0.9}),
    ("skew_forward_kl", {"skew": 0.4}),
    ("skew_reverse_kl", {"skew": 0.4}),
    ("adaptive_kl", {"head_mass": 0.8}),
    ("alpha_beta", {"alpha": 0.9, "beta": 0.2}),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}),
    *((name, {}) for name in DIVERGENCES),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_divergence_equals_a_naive_loop(name, options):
    learner, target = logprobs(0), logprobs(1)
    actual = DIVERGENCES[name](learner, target, **options)
    for row, (q, p) in enumerate(zip(learner.exp().tolist(), target.exp().tolist(), strict=True)):
        assert actual[row].item() == pytest.approx(NAIVE[name](q, p, **options), rel=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_of_a_distribution_to_itself_is_zero(name):
    same = logprobs(0)
    assert DIVERGENCES[name](same, same).abs().max() < 1e-14


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_divergence_is_positive_between_different_distributions(name, options):
    for seed in range(20):
        values = DIVERGENCES[name](logprobs(seed), logprobs(seed + 100), **options)
        assert values.min() > 0


def test_jsd_over_beta_tends_to_the_forward_kl():
    learner, target = logprobs(0), logprobs(1)
    limit = generalized_jsd(learner, target, beta=1e-7) / 1e-7
    torch.testing.assert_close(limit, forward_kl(learner, target), rtol=1e-4, atol=0)


def test_jsd_over_one_minus_beta_tends_to_the_reverse_kl():
    learner, target = logprobs(0), logprobs(1)
    limit = generalized_jsd(learner, target, beta=1 - 1e-7) / 1e-7
    torch.testing.assert_close(limit, reverse_kl(learner, target), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"alpha": 1.0, "beta": 0.0}, forward_kl), ({"alpha": 0.0, "beta": 1.0}, reverse_kl)],
)
def test_alpha_beta_at_its_corners_is_a_kl_with_its_gradient(options, limit):
    target = logprobs(1)
    gradients = []
    for divergence in (lambda q, p: alpha_beta(q, p, **options), limit):
        logits = logprobs(0).requires_grad_()
        values = divergence(logits.log_softmax(-1), target)
        gradients.append(torch.autograd.grad(values.sum(), logits)[0])
        torch.testing.assert_close(values, limit(logprobs(0), target), rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("small", ["alpha", "beta"])
def test_alpha_beta_is_continuous_at_its_edges(small):
    learner, target = logprobs(0), logprobs(1)
    other = {"alpha": "beta", "beta": "alpha"}[small]
    near = alpha_beta(learner, target, **{small: 1e-6, other: 0.6})
    at = alpha_beta(learner, target, **{small: 0.0, other: 0.6})
    torch.testing.assert_close(near, at, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 0.5), (0.5, -0.1), (0.0, 0.0)])
def test_alpha_beta_refuses_what_has_no_bound(alpha, beta):
    with pytest.raises(ValueError, match=f"alpha is {alpha} and beta {beta}"):
        alpha_beta(logprobs(0), logprobs(1), alpha=alpha, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, 2.0])
def test_jsd_refuses_a_beta_where_it_would_vanish(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}"):
        generalized_jsd(logprobs(0), logprobs(1), beta=beta)


def test_jsd_at_one_half_is_symmetric_and_at_most_log_2():
    learner, target = logprobs(0, spread=30.0), logprobs(1, spread=30.0)
    there, back = generalized_jsd(learner, target), generalized_jsd(target, learner)
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)
    assert 0.5 * math.log(2) < there.max() <= math.log(2)


def test_skew_zero_is_the_plain_kl():
    learner, target = logprobs(0), logprobs(1)
    assert torch.equal(skew_forward_kl(learner, target, skew=0.0), forward_kl(learner, target))
    assert torch.equal(skew_reverse_kl(learner, target, skew=0.0), reverse_kl(learner, target))


@pytest.mark.parametrize("skew", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("divergence", [skew_forward_kl, skew_reverse_kl])
def test_skew_kl_is_bounded_by_the_log_of_one_over_skew(divergence, skew):
    values = divergence(logprobs(0, spread=80.0), logprobs(1, spread=80.0), skew=skew)
    bound = math.log(1 / skew)
    assert 0.9 * bound < values.max() <= bound * (1 + 1e-12)


def test_total_variation_lies_between_zero_and_one():
    far = total_variation(logprobs(0, spread=300.0), logprobs(1, spread=300.0))
    near = total_variation(logprobs(0, spread=0.1), logprobs(1, spread=0.1))
    assert 0 < near.min() < 0.1
    assert 0.99 < far.max() <= 1 + 1e-12


@pytest.mark.parametrize("name", ["reverse_kl", "skew_reverse_kl", "generalized_jsd"])
def test_learner_with_impossible_tokens_has_finite_values_and_gradients(name):
    logits = torch.tensor([[1.0, 0.5, -torch.inf, 0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.2, 0.3, 0.4, 0.1]], dtype=torch.float64).log()
    value = DIVERGENCES[name](logits.log_softmax(-1), target)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    q, p = logits.detach().softmax(-1)[0].tolist(), target.exp()[0].tolist()
    assert value.item() == pytest.approx(NAIVE[name](q, p), rel=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "skew_forward_kl", "generalized_jsd"])
def test_target_with_impossible_tokens_has_finite_values_and_gradients(name):
    logits = torch.tensor([[1.0, 0.5, -2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.5, 0.3, 0.0, 0.2]], dtype=torch.float64).log()
    value = DIVERGENCES[name](logits.log_softmax(-1), target)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all()
    q, p = logits.detach().softmax(-1)[0].tolist(), target.exp()[0].tolist()
    assert value.item() == pytest.approx(NAIVE[name](q, p), rel=1e-12)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_token_that_both_hold_impossible_changes_no_value_and_no_gradient(name, options):
    z, target = logprobs(4, rows=2), logprobs(5, rows=2)
    nowhere = torch.full((2, 1), -torch.inf, dtype=torch.float64)
    logits = torch.cat([z, nowhere], dim=1)
    wider = torch.cat([target, nowhere], dim=1)
    torch.testing.assert_close(
        DIVERGENCES[name](logits.log_softmax(-1), wider, **options),
        DIVERGENCES[name](z, target, **options),
        rtol=1e-12,
        atol=0,
    )
    actual = student_gradient(DIVERGENCES[name], logits, wider, **options)
    expected = student_gradient(DIVERGENCES[name], z, target, **options)
    torch.testing.assert_close(actual[:, :-1], expected, rtol=1e-10, atol=1e-15)
    assert torch.equal(actual[:, -1], torch.zeros(2, dtype=torch.float64))


def test_kl_to_a_distribution_that_forbids_a_possible_token_is_infinite():
    possible = torch.tensor([[0.5, 0.5]]).log()
    forbidding = torch.tensor([[1.0, 0.0]]).log()
    assert kl(possible, forbidding).item() == math.inf


def student_gradient(divergence, logits, target, **options):
    logits = logits.clone().requires_grad_(True)
    divergence(logits.log_softmax(-1), target, **options).sum().backward()
    return logits.grad


def test_gradient_of_the_forward_kl_is_q_minus_p():
    z, target = logprobs(0), logprobs(1)
    expected = z.softmax(-1) - target.exp()
    actual = student_gradient(forward_kl, z, target)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_gradient_of_the_reverse_kl_weighs_log_ratios_by_q():
    z, target = logprobs(0), logprobs(1)
    q, ratio = z.softmax(-1), z.log_softmax(-1) - target
    expected = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    actual = student_gradient(reverse_kl, z, target)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_gradient_of_the_total_variation_weighs_signs_by_q():
    z, target = logprobs(0), logprobs(1)
    q = z.softmax(-1)
    sign = (q - target.exp()).sign()
    expected = 0.5 * q * (sign - (q * sign).sum(-1, keepdim=True))
    actual = student_gradient(total_variation, z, target)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_gradient_equals_finite_differences_of_the_naive_loop(name, options):
    z, target = logprobs(2, rows=1), logprobs(3, rows=1)
    actual = student_gradient(DIVERGENCES[name], z, target, **options)[0]
    p, h = target.exp()[0].tolist(), 1e-6
    weight = None
    if name == "adaptive_kl":  # its weights carry no gradient
        q = z.softmax(-1)[0].tolist()
        whole, there, back = NAIVE[name](q, p, **options), naive_kl(p, q), naive_kl(q, p)
        weight = (whole - back) / (there - back)

    def value(moved):
        q = moved.softmax(-1)[0].tolist()
        if weight is not None:
            return weight * naive_kl(p, q) + (1 - weight) * naive_kl(q, p)
        return NAIVE[name](q, p, **options)

    for v in range(VOCABULARY):
        step = torch.zeros_like(z)
        step[0, v] = h
        numeric = (value(z + step) - value(z - step)) / (2 * h)
        assert actual[v].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_gradient_reaches_the_target_too_because_nothing_is_detached():
    target = logprobs(1).requires_grad_(True)
    reverse_kl(logprobs(0), target).sum().backward()
    torch.testing.assert_close(target.grad, -logprobs(0).exp(), rtol=1e-12, atol=0)
