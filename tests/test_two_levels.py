"""A method is several trained models: intervals cover other requests and other training seeds."""

import math
import random
from statistics import fmean, variance

import numpy as np
import pytest

from promptkd.evaluation.two_levels import (
    Estimate,
    estimate,
    holm,
    student_quantile,
    student_tail,
)
from promptkd.study.power import components


def scores(values: np.ndarray) -> np.ndarray:
    """(seeds, requests, 2): one response each."""
    return np.stack([values, np.ones_like(values)], axis=-1)


def simulated(
    random: np.random.Generator, num_seeds: int, num_requests: int, spread: float, shift: float = 0
) -> np.ndarray:
    """Scores that differ between requests, between training seeds, and beside that."""
    own = random.normal(0, spread, (num_seeds, 1)) + random.normal(0, 8, (num_seeds, num_requests))
    return scores(20 + shift + own)


def covered(spread: float, num_seeds: int, num_studies: int = 400) -> float:
    """The share of simulated studies whose interval holds the true difference, 1."""
    source, hits = np.random.default_rng(5), 0
    for _ in range(num_studies):
        ours = simulated(source, num_seeds, 60, spread, shift=1)
        low, high = estimate([ours], [simulated(source, num_seeds, 60, spread)]).interval_95
        hits += low <= 1 <= high
    return hits / num_studies


# -- the estimate


def test_a_difference_and_its_error_are_those_of_loops_over_requests_and_seeds():
    source = np.random.default_rng(1)
    counts = source.integers(3, 30, (2, 3, 40)).astype(float)
    sums = counts * source.normal(1, 0.3, (2, 3, 40))
    first, second = (np.stack([sums[i], counts[i]], axis=-1) for i in (0, 1))
    found = estimate([first], [second])

    def gap(seed: int, rows: list[int]) -> float:
        ours, theirs = (
            sum(sums[i, seed, r] for r in rows) / sum(counts[i, seed, r] for r in rows)
            for i in (0, 1)
        )
        return ours - theirs

    everyone, draw = list(range(40)), random.Random(2)
    gaps = [gap(seed, everyone) for seed in range(3)]
    resampled = [draw.choices(everyone, k=39) for _ in range(3000)]
    of_requests = variance([fmean(gap(seed, rows) for seed in range(3)) for rows in resampled])
    of_seeds = variance(gaps) / 3

    assert found.value == pytest.approx(fmean(gaps))
    assert found.standard_error == pytest.approx(math.sqrt(of_requests + of_seeds), rel=0.06)
    freedom = (of_requests + of_seeds) ** 2 / (of_requests**2 / 39 + of_seeds**2 / 2)
    assert found.degrees_of_freedom == pytest.approx(freedom, rel=0.2)


def test_the_bootstrap_over_requests_has_the_variance_of_a_mean():
    values = np.random.default_rng(3).normal(0, 5, (1, 50))
    error = estimate([scores(values)]).standard_error
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=0.05)


def test_over_data_sets_it_is_the_mean_of_theirs_whatever_their_sizes():
    source = np.random.default_rng(4)
    small, large = (simulated(source, 3, n, 0.5) for n in (20, 200))
    each = [estimate([own]).value for own in (small, large)]
    whole = estimate([small, large])
    assert whole.value == pytest.approx(fmean(each))
    assert (whole.num_seeds, whole.num_requests) == (3, 220)


def test_training_seeds_that_agree_on_every_data_set_are_no_independent_evidence():
    """A seed that is lucky is so everywhere: its luck is averaged over seeds alone."""
    luck = np.array([[-1.0], [0.0], [1.0]])
    sets = [scores(np.zeros((3, 30)) + luck) for _ in range(4)]
    assert estimate(sets).standard_error == pytest.approx(estimate(sets[:1]).standard_error)
    assert estimate(sets).standard_error == pytest.approx(1 / math.sqrt(3))


def test_a_teacher_without_training_seeds_is_compared_with_each_seed():
    source = np.random.default_rng(6)
    ours, teacher = simulated(source, 3, 40, 1.0), simulated(source, 1, 40, 0.0)
    repeated = estimate([ours], [np.repeat(teacher, 3, axis=0)])
    assert estimate([ours], [teacher]) == repeated


def test_equal_requests_are_drawn_for_both_so_what_they_share_cancels():
    source = np.random.default_rng(7)
    hard = source.normal(0, 50, (1, 80))
    first, second = (scores(hard + source.normal(0, 1, (2, 80))) for _ in range(2))
    assert estimate([first], [second]).standard_error < 0.5
    assert estimate([first]).standard_error > 4


# -- how often it is right


@pytest.mark.parametrize(("spread", "num_seeds"), [(0.0, 3), (1.0, 3), (4.0, 3), (1.0, 5)])
def test_intervals_cover_the_truth_as_often_as_they_say(spread, num_seeds):
    """Within simulation error (1.1 points) and the few seeds' own; rather too often."""
    assert covered(spread, num_seeds) >= 0.91


def test_an_interval_over_requests_alone_covers_far_less_where_training_seeds_differ():
    source, hits = np.random.default_rng(5), 0
    for _ in range(200):
        ours, theirs = (simulated(source, 3, 60, 4.0, shift=s) for s in (1, 0))
        pooled = [scores(own[..., 0].mean(0, keepdims=True)) for own in (ours, theirs)]
        low, high = estimate(pooled[:1], pooled[1:]).interval_95
        hits += low <= 1 <= high
    assert hits / 200 < 0.75


def test_with_nothing_to_find_few_families_of_comparisons_establish_anything():
    """Six methods against one baseline, no true difference: at most 5 % of studies err."""
    source, false = np.random.default_rng(8), 0
    for _ in range(200):
        baseline, *methods = (simulated(source, 3, 40, 1.0) for _ in range(7))
        corrected = holm([estimate([own], [baseline]).p_value for own in methods])
        false += min(corrected) < 0.05
    assert false / 200 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_a_difference_as_large_as_the_detectable_one_is_found_in_about_four_of_five_studies():
    source, found, sizes = np.random.default_rng(9), 0, []
    size = 3.6
    for _ in range(200):
        ours, theirs = simulated(source, 5, 60, 1.0, shift=size), simulated(source, 5, 60, 1.0)
        own = estimate([ours], [theirs])
        found += own.p_value < 0.05
        sizes.append(own.detectable())
    assert fmean(sizes) == pytest.approx(size, rel=0.15)
    assert 0.72 <= found / 200 <= 0.93


# -- its parts


def test_student_quantiles_are_those_of_tables():
    table = {(0.05, 1): 12.706, (0.05, 2): 4.303, (0.05, 10): 2.228, (0.01, 4): 4.604}
    for (level, freedom), t in table.items():
        assert student_quantile(level, freedom) == pytest.approx(t, abs=6e-4)
        assert student_tail(student_quantile(level, freedom), freedom) == pytest.approx(level)
    assert student_quantile(0.05, 1e9) == pytest.approx(1.96, abs=3e-3)


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_no_spread_at_all_is_certain():
    same = estimate([scores(np.full((2, 5), 3.0))], [scores(np.full((2, 5), 3.0))])
    assert (same.value, same.p_value, same.interval_95) == (0.0, 1.0, (0.0, 0.0))
    assert estimate([scores(np.full((2, 5), 3.0))]).p_value == 0.0


def test_more_comparisons_need_a_larger_difference():
    own = Estimate(0.0, 1.0, 30.0, num_seeds=3, num_requests=100)
    assert own.detectable(10) > own.detectable(1) > 2.8


# -- power


def responses(
    source: np.random.Generator, shape: tuple[int, int, int], num_sets: int = 1
) -> list[np.ndarray]:
    """Deviations 2 between training seeds, 6 requests, 3 of both, 9 decoding seeds."""
    s, n, d = shape
    luck = source.normal(0, 2, (s, 1, 1))
    return [
        source.normal(0, 6, (1, n, 1))
        + luck
        + source.normal(0, 3, (s, n, 1))
        + source.normal(0, 9, (s, n, d))
        for _ in range(num_sets)
    ]


def test_the_components_are_those_that_the_data_were_made_of():
    found = components(responses(np.random.default_rng(10), (80, 400, 4)))
    assert found.between_training == pytest.approx(4, rel=0.35)
    assert found.between_requests[0] == pytest.approx(36, rel=0.2)
    assert found.of_both[0] == pytest.approx(9, rel=0.15)
    assert found.between_decoding[0] == pytest.approx(81, rel=0.03)
    assert found.rows == (400,)


def test_the_forecast_of_a_design_is_what_studies_of_that_design_then_say():
    """Noise from one method; then a smaller design is simulated with two that are alike."""
    source = np.random.default_rng(11)
    known = components(responses(source, (80, 100, 4), num_sets=2))
    requests = source.normal(0, 6, (1, 50, 1))
    seen = []
    for _ in range(60):
        methods = []
        for _ in range(2):
            luck = source.normal(0, 2, (3, 1, 1))
            sets = [
                requests + luck + source.normal(0, 3, (3, 50, 1)) + source.normal(0, 9, (3, 50, 2))
                for _ in range(2)
            ]
            methods.append([scores(own.mean(2)) for own in sets])
        seen.append(estimate(*methods).standard_error ** 2)
    of_requests = 2 * (9 + 81 / 2) / 50 / 3 / 2
    # what each level should see, from the numbers the simulation was made of
    expected = math.sqrt(2 * 4 / 3 + 2 * of_requests)
    assert math.sqrt(fmean(seen)) == pytest.approx(expected, rel=0.15)
    forecast = known.detectable(3, 2, share=0.5)
    freedom = expected**4 / (of_requests**2 / 99 + (expected**2 - of_requests) ** 2 / 2)
    tails = student_quantile(0.05, freedom) + student_quantile(0.4, freedom)
    assert forecast == pytest.approx(expected * tails, rel=0.25)


def test_more_of_anything_never_makes_a_design_worse():
    known = components(responses(np.random.default_rng(12), (5, 60, 3)))
    least = known.detectable(2, 1, 0.5)
    for design in ((3, 1, 0.5), (2, 3, 0.5), (2, 1, 1.0)):
        assert known.detectable(*design) < least
    assert known.detectable(2, 1, 0.5, num_comparisons=8) > least
