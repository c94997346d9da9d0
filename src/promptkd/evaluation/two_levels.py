"""How sure a method's score is: over requests and over training seeds. No torch.

Other requests would give other scores, and so would other training seeds; the variances of both
levels add up:

    V = V_requests + V_seeds,    V_requests: bootstrap over requests, the same ones for both methods
                                 V_seeds = s² / S, s² between the S seeds' own differences

The noise of single responses is in both, so V is rather too large than too small. Few seeds know
little of their own spread: quantiles are Student's, with Satterthwaite's degrees of freedom

    ν = V² / (V_requests² / (n - 1) + V_seeds² / (S - 1)).

A single training seed says nothing of others: then V_seeds is missing, and the interval is one for
these very students.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import mpmath
import numpy as np

from promptkd.evaluation.statistics import resampled_counts

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of two, and how sure it is.

    Attributes:
        num_seeds: training seeds that it is a mean over.
    """

    value: float
    standard_error: float
    degrees_of_freedom: float
    num_seeds: int
    num_requests: int

    @property
    def interval_95(self) -> tuple[float, float]:
        half = student_quantile(LEVEL, self.degrees_of_freedom) * self.standard_error
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the value is 0."""
        if not self.standard_error:
            return float(self.value == 0)
        return student_tail(abs(self.value) / self.standard_error, self.degrees_of_freedom)

    def detectable(self, num_comparisons: int = 1) -> float:
        """The smallest true difference that would be established with a power of 80 %.

        (t(α / m) + t(power)) · SE: the level α is that of the first of m comparisons by Holm.
        """
        return detectable(self.standard_error, self.degrees_of_freedom, num_comparisons)


def estimate(first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None = None) -> Estimate:
    """A method's score, or the difference of two, as the mean over data sets.

    Args:
        first: per data set (seeds, requests, 2): sums over decoding seeds, and over how many.
        second: likewise, paired with the first by training seed and by request. A model without
            training seeds (a teacher, say) has one, and is compared with each.

    Raises:
        ValueError: if the requests or the numbers of seeds don't fit together.
    """
    replicates = _resampled(first)
    values = np.mean([_ratio(own.sum(1)) for own in first], axis=0)
    if second is not None:
        replicates = replicates - _resampled(second)
        values = values - np.mean([_ratio(other.sum(1)) for other in second], axis=0)
    of_requests = float(replicates.mean(1).var(ddof=1))
    num_seeds, num_requests = len(values), sum(own.shape[1] for own in first)
    of_seeds = float(values.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    variance, freedom = combined(of_requests, of_seeds, num_requests, num_seeds)
    return Estimate(
        value=float(values.mean()),
        standard_error=math.sqrt(variance),
        degrees_of_freedom=freedom,
        num_seeds=num_seeds,
        num_requests=num_requests,
    )


def combined(
    of_requests: float, of_seeds: float, num_requests: int, num_seeds: int
) -> tuple[float, float]:
    """Both levels' variances as one, and its degrees of freedom (Satterthwaite 1946)."""
    variance = of_requests + of_seeds
    parts = of_requests**2 / max(1, num_requests - 1) + of_seeds**2 / max(1, num_seeds - 1)
    return variance, variance**2 / parts if parts else float(max(1, num_requests - 1))


def detectable(standard_error: float, freedom: float, num_comparisons: int = 1) -> float:
    """See ``Estimate.detectable``."""
    needed = student_quantile(LEVEL / num_comparisons, freedom)
    return standard_error * (needed + student_quantile(2 * (1 - POWER), freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that, with all below 0.05 called, one false call in 20 families is expected.

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's.

    Source: Holm 1979.

    >>> holm([0.04, 0.01, 0.5])
    [0.08, 0.03, 0.5]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def student_tail(t: float, freedom: float) -> float:
    """P(|T| > t) for Student's T."""
    share = freedom / (freedom + t * t)
    return float(mpmath.betainc(freedom / 2, 0.5, 0, share, regularized=True))


def student_quantile(level: float, freedom: float) -> float:
    """The t with P(|T| > t) = level.

    >>> round(student_quantile(0.05, 2), 3)
    4.303
    """
    return _quantile(level, round(freedom, 2) if freedom < 1000 else 1000.0)


@lru_cache(maxsize=10_000)
def _quantile(level: float, freedom: float) -> float:
    """By Newton's method from the normal's: the tail is convex, so from below and never past."""
    t = NormalDist().inv_cdf(1 - level / 2)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    for _ in range(100):
        density = math.exp(scale - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        density /= math.sqrt(freedom * math.pi)
        step = (student_tail(t, freedom) - level) / (2 * density)
        t += step
        if abs(step) < 1e-10 * t:
            break
    return t


def _ratio(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def _resampled(sets: Sequence[np.ndarray]) -> np.ndarray:
    """(resamples, seeds): the mean over data sets; requests are drawn within each.

    n - 1 of n are drawn, so that the variance has no bias (Rao and Wu 1988). Equal requests are
    drawn for whoever answered them.
    """
    found = [
        _ratio(np.moveaxis(_drawn(own.shape[1], place) @ own, 0, 1))
        for place, own in enumerate(sets)
    ]
    return np.mean(found, axis=0)


@lru_cache(maxsize=8)
def _drawn(num_requests: int, seed: int) -> np.ndarray:
    return resampled_counts(num_requests, seed, max(1, num_requests - 1)).astype(float)
