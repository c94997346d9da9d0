"""Curves of exposure bias from given gaps: the paper's, the per-token one, and their intervals."""

import numpy as np
import pytest
import torch
from torch import tensor

from promptkd.evaluation.exposure_curves import (
    Gaps,
    describe_gaps,
    excess_accumulated_error,
    exposure_curve,
    exposure_intervals,
)


def gaps_of(*requests):
    """One sample per request, from lists of nats; the longest gives the number of steps."""
    steps = max(map(len, requests))
    rows = [[*nats, *[0.0] * (steps - len(nats))] for nats in requests]
    return Gaps(tensor(rows).double()[:, None], tensor([[len(nats)] for nats in requests]))


def test_excess_is_the_difference_in_percent_of_the_teacher_gap():
    excess = excess_accumulated_error(tensor([2.0, 6.0, 1.0]), tensor([2.0, 4.0, 4.0]))
    assert excess.tolist() == [0.0, 50.0, -75.0]


@pytest.mark.parametrize("gap", [0.0, -1.0])
def test_excess_of_a_teacher_gap_that_is_not_positive_is_refused(gap):
    with pytest.raises(ValueError, match="must be positive"):
        excess_accumulated_error(tensor([1.0, 1.0]), tensor([1.0, gap]))


def test_the_papers_curve_counts_ended_responses_as_zero():
    by_student = gaps_of([1.0, 2.0], [3.0])
    by_teacher = gaps_of([1.0, 1.0], [3.0, 1.0])
    curve = exposure_curve(by_student, by_teacher)
    assert curve.student_gap.tolist() == [2.0, 3.0]  # (1 + 3) / 2, then + (2 + 0) / 2
    assert curve.teacher_gap.tolist() == [2.0, 3.0]
    assert curve.excess.tolist() == [0.0, 0.0]


def test_the_per_token_curve_averages_over_running_responses_only():
    by_student = gaps_of([1.0, 2.0], [3.0])
    by_teacher = gaps_of([1.0, 1.0], [3.0, 1.0])
    curve = exposure_curve(by_student, by_teacher, per_token=True)
    assert curve.student_gap.tolist() == [2.0, 4.0]  # (1 + 3) / 2, then + 2 / 1
    assert curve.teacher_gap.tolist() == [2.0, 3.0]
    assert curve.excess.tolist() == pytest.approx([0.0, 100 / 3])


def test_stopping_early_lowers_the_papers_excess_and_not_the_per_token_one():
    same_gap_everywhere = [1.0] * 4
    by_student = gaps_of(same_gap_everywhere, [1.0], [1.0], [1.0])
    by_teacher = gaps_of(*[same_gap_everywhere] * 4)
    assert exposure_curve(by_student, by_teacher).excess[-1].item() == pytest.approx(-56.25)
    per_token = exposure_curve(by_student, by_teacher, per_token=True)
    assert per_token.excess.tolist() == [0.0] * 4


def test_the_per_token_curve_ends_with_the_shorter_authors_longest_response():
    by_student = Gaps(torch.ones(2, 1, 5).double(), tensor([[3], [1]]))
    by_teacher = Gaps(torch.ones(2, 1, 5).double(), tensor([[5], [2]]))
    described = describe_gaps(by_student, by_teacher)
    assert described["per_token"]["steps"] == [1, 2, 3]
    assert described["steps"] == [1, 2, 3, 4, 5]
    assert described["survival"] == {
        "student": [1.0, 0.5, 0.5, 0.0, 0.0],
        "teacher": [1.0, 1.0, 0.5, 0.5, 0.5],
    }
    assert described["mean_length"] == {"student": 2.0, "teacher": 3.5}


def test_excess_is_none_where_the_teacher_gap_is_rounding():
    by_student, by_teacher = gaps_of([1e-8, 2.0], [0.0, 2.0]), gaps_of([1e-8, 1.0], [0.0, 1.0])
    described = describe_gaps(by_student, by_teacher)
    assert described["excess"][0] is None
    assert described["excess"][1] == pytest.approx(100.0)
    assert described["intervals"]["excess"]["low"][0] is None


def test_each_seed_gives_its_own_curve():
    nats = tensor([[[1.0], [3.0]], [[1.0], [3.0]]]).double()  # seed 1 gives 1, seed 2 gives 3
    ones = Gaps(torch.ones(2, 2, 1).double(), torch.ones(2, 2).long())
    described = describe_gaps(Gaps(nats, ones.lengths), ones, num_seeds=2)
    assert described["excess_by_seed"] == [[0.0], [200.0]]
    assert described["excess"] == [100.0]


@pytest.mark.parametrize("per_token", [False, True])
def test_intervals_are_those_of_resampling_requests_one_by_one(per_token):
    random = np.random.default_rng(0)
    both = [
        gaps_of(*(random.gamma(2, 1, random.integers(2, 5)).tolist() for _ in range(7)))
        for _ in range(2)
    ]
    intervals = exposure_intervals(*both, per_token=per_token)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=2000)
    drawn = []
    for count in counts:
        rows = np.repeat(np.arange(7), count)
        sums = []
        for gaps in both:
            nats, lengths = gaps.nats[rows, 0].numpy(), gaps.lengths[rows, 0].numpy()
            total = 0.0
            for t in range(2):  # every response has two tokens
                running = [n[t] for n, length in zip(nats, lengths, strict=True) if length > t]
                total += sum(running) / (len(running) if per_token else len(rows))
            sums.append(total)
        drawn.append(100 * (sums[0] - sums[1]) / sums[1])
    low, high = intervals["excess"]
    expected = np.quantile(drawn, [0.025, 0.975])
    assert [low[1].item(), high[1].item()] == pytest.approx(expected.tolist())


@pytest.mark.parametrize("per_token", [False, True])
def test_intervals_cover_the_truth_in_simulated_data(per_token):
    """Gamma gaps around request effects, geometric lengths; the student's gaps are 1.3 times."""
    num_steps, stays, factor, hits = 4, 0.8, 1.3, 0
    random = np.random.default_rng(0)

    def simulate(scale):
        effect = random.gamma(4, 0.25, (60, 1, 1))
        lengths = np.minimum(random.geometric(1 - stays, (60, 2)), num_steps)
        nats = scale * effect * random.gamma(2, 0.5, (60, 2, num_steps))
        nats *= np.arange(num_steps) < lengths[..., None]
        return Gaps(torch.from_numpy(nats), torch.from_numpy(lengths))

    for _ in range(200):
        intervals = exposure_intervals(simulate(factor), simulate(1.0), per_token=per_token)
        low, high = intervals["excess"]
        hits += low[-1].item() <= 100 * (factor - 1) <= high[-1].item()
    assert 0.88 <= hits / 200 <= 0.99
