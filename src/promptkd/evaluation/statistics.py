"""Means with their uncertainty: deviations over seeds, bootstrap intervals over requests. No torch.

An interval of one model is the 95 % percentile bootstrap over requests of 2,000 resamples; that of
a method, which is several models (one per training seed), is in ``two_levels``.
"""

import math
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 2000
TAILS = (0.025, 0.975)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def bootstrap_interval(
    values: Sequence[float], counts: Sequence[float] | None = None
) -> tuple[float, float]:
    """Interval of the mean of ``values``, or with ``counts`` of sum(values) / sum(counts).

    Args:
        values: one per request; with ``counts`` a request's sum over its tokens.
        counts: a request's number of tokens.

    Raises:
        ValueError: if there are no values.

    >>> bootstrap_interval([2.0, 4.0], counts=[1, 2])
    (2.0, 2.0)
    """
    if not len(values):
        raise ValueError("the interval of no values is undefined")
    sums = np.asarray(values, dtype=float)
    sizes = np.ones(len(sums)) if counts is None else np.asarray(counts, dtype=float)
    random, at_once = np.random.default_rng(0), max(1, 1_000_000 // len(sums))
    means = []
    for left in range(NUM_RESAMPLES, 0, -at_once):
        drawn = random.integers(len(sums), size=(min(at_once, left), len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), TAILS)
    return float(low), float(high)


def resampled_counts(num_requests: int, seed: int = 0, num_drawn: int | None = None) -> np.ndarray:
    """How often each request is drawn, (NUM_RESAMPLES, num_requests), for what is no plain mean.

    As many are drawn as there are, or ``num_drawn``.
    """
    drawn, share = num_drawn or num_requests, np.full(num_requests, 1 / num_requests)
    return np.random.default_rng(seed).multinomial(drawn, share, size=NUM_RESAMPLES)


def paired_difference(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> tuple[float, float, float]:
    """Mean of first - mean of second over the same requests, with its interval.

    Args:
        first: one (sum, count) per request; a mean is the sum of sums over the sum of counts.
        second: likewise, in the same order.

    Raises:
        ValueError: if the lengths differ.

    >>> paired_difference([(3.0, 1), (5.0, 1)], [(2.0, 1), (4.0, 1)])
    (1.0, 1.0, 1.0)
    """
    if len(first) != len(second):
        raise ValueError(f"paired scores need the same requests: {len(first)} and {len(second)}")
    own, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    drawn = resampled_counts(len(own))
    ours, theirs = drawn @ own, drawn @ other
    gaps = ours[:, 0] / ours[:, 1] - theirs[:, 0] / theirs[:, 1]
    low, high = np.quantile(gaps, TAILS)
    mean = own[:, 0].sum() / own[:, 1].sum() - other[:, 0].sum() / other[:, 1].sum()
    return float(mean), float(low), float(high)
