"""The arithmetic of exposure bias: from gaps per token to R(l), E(l), ExAccErr(l) and intervals.

    R(l), E(l)  = sum_{t<=l} d(t), with d(t) the mean over responses of KL(teacher || student) at t
    ExAccErr(l) = 100 (R(l) - E(l)) / E(l)

Pure functions of what was measured (``exposure_bias``); no model is known here.

Source: Arora et al. 2022; PromptKD, arXiv:2402.12842, Eq. 5-7.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, tensor

from promptkd.evaluation.statistics import NUM_RESAMPLES, TAILS, resampled_counts

PerStep: TypeAlias = Float[Tensor, "*resamples steps"]

NO_GAP = 1e-6
"""Nats; below this, KL(teacher || student) is rounding, and a ratio to it means nothing."""


@dataclass(frozen=True)
class Gaps:
    """KL(teacher || student) at each token of the responses of one author.

    Attributes:
        nats: 0 after a response's end.
        lengths: of the responses, in tokens, the stop token included.
    """

    nats: Float[Tensor, "requests samples steps"]
    lengths: Int[Tensor, "requests samples"]

    @property
    def num_steps(self) -> int:
        return self.nats.shape[-1]

    @property
    def running(self) -> Bool[Tensor, "requests samples steps"]:
        """Whether a response has a token at t = 1, 2, ..."""
        return torch.arange(self.num_steps) < self.lengths[..., None]

    @property
    def survival(self) -> Float[Tensor, " steps"]:
        """The share of the responses still running at t."""
        return self.running.double().mean((0, 1))

    def split(self, num_parts: int) -> list["Gaps"]:
        """The samples in equal parts, one after the other."""
        parts = zip(self.nats.chunk(num_parts, 1), self.lengths.chunk(num_parts, 1), strict=True)
        return [Gaps(nats, lengths) for nats, lengths in parts]


@dataclass(frozen=True)
class Curve:
    """R and E, in nats, for l = 1, 2, ..."""

    student_gap: Float[Tensor, " steps"]
    teacher_gap: Float[Tensor, " steps"]

    @property
    def excess(self) -> Float[Tensor, " steps"]:
        """ExAccErr, in percent; NaN where the teacher gap is none and the ratio 0 / 0."""
        return _excess_where_defined(self.student_gap, self.teacher_gap)

    def to_dict(self) -> dict[str, Any]:
        """Lists of equal length; None where the excess is undefined."""
        return {
            "steps": list(range(1, len(self.student_gap) + 1)),
            "student_gap": self.student_gap.tolist(),
            "teacher_gap": self.teacher_gap.tolist(),
            "excess": numbers(self.excess),
        }


def excess_accumulated_error(student_gap: PerStep, teacher_gap: PerStep) -> PerStep:
    """How much of the student's error comes from its own earlier tokens, in percent.

    ExAccErr(l) = 100 * (R(l) - E(l)) / E(l), where R and E are KL(teacher || student) summed over
    the first l tokens of responses written by the student (R) or by the teacher (E). 0 is no
    exposure bias.

    Args:
        student_gap: R, in nats, one entry per generation step.
        teacher_gap: E, same length, positive.

    Raises:
        ValueError: if a teacher gap is not positive, because the ratio would mean nothing.

    Source: Arora et al. 2022; PromptKD, arXiv:2402.12842, Eq. 5-7.

    >>> excess_accumulated_error(tensor([2.0, 6.0]), tensor([2.0, 4.0]))
    tensor([ 0., 50.])
    """
    if (teacher_gap <= 0).any():
        raise ValueError(
            f"a teacher gap is {teacher_gap.min().item():.3g} nats: the excess is a ratio to it, "
            "so it must be positive. Student and teacher must differ."
        )
    return 100 * (student_gap - teacher_gap) / teacher_gap


def accumulated_gap(
    gaps: Gaps, weights: Float[Tensor, "resamples requests"], per_token: bool
) -> Float[Tensor, "resamples steps"]:
    """The sum over t <= l of the mean gap at t, for every weighting of the requests.

    With w_i the weight of request i, S samples each, T_is their lengths:

        paper      d(t) = sum_is w_i KL_ist / sum_i w_i S
        per token  d(t) = sum_is w_i KL_ist / sum_is w_i [T_is >= t]       NaN when none is running
    """
    counted = gaps.running.double() if per_token else torch.ones_like(gaps.nats)
    means = (weights @ gaps.nats.sum(1)) / (weights @ counted.sum(1))
    return means.cumsum(-1)


def exposure_curve(by_student: Gaps, by_teacher: Gaps, *, per_token: bool = False) -> Curve:
    """R and E; the per-token version ends where no response of one of the authors is running."""
    last = _last_step(by_student, by_teacher, per_token)
    student_gap, teacher_gap = (
        accumulated_gap(gaps, torch.ones(1, len(gaps.nats), dtype=torch.double), per_token)[0]
        for gaps in (by_student, by_teacher)
    )
    return Curve(student_gap[:last], teacher_gap[:last])


def exposure_intervals(
    by_student: Gaps,
    by_teacher: Gaps,
    *,
    per_token: bool = False,
) -> dict[str, tuple[PerStep, PerStep]]:
    """Percentile bootstrap over requests: (low, high) of R, E and ExAccErr at every l.

    A resample takes the same requests for both authors, with all of their samples.

    >>> gaps = Gaps(tensor([[[1.0, 2.0]], [[1.0, 2.0]]]).double(), tensor([[2], [2]]))
    >>> exposure_intervals(gaps, gaps)["student_gap"][0].tolist()
    [1.0, 3.0]
    """
    weights = torch.from_numpy(resampled_counts(len(by_student.nats))).double()
    last = _last_step(by_student, by_teacher, per_token)
    student_gap = accumulated_gap(by_student, weights, per_token)[:, :last]
    teacher_gap = accumulated_gap(by_teacher, weights, per_token)[:, :last]
    drawn = {
        "student_gap": student_gap,
        "teacher_gap": teacher_gap,
        "excess": _excess_where_defined(student_gap, teacher_gap),
    }
    ends = tensor(TAILS, dtype=torch.double)
    intervals = {}
    for name, values in drawn.items():
        # A resample without a response that is still running says nothing about that step.
        low, high = values.nanquantile(ends, dim=0)
        intervals[name] = low, high
    return intervals


def authors_curve(by_student: Gaps, by_teacher: Gaps) -> dict[str, Float[Tensor, " steps"]]:
    """What the authors' script makes of its gaps, defects included.

    Per request sum_s KL_st / (sum_s [running] + 0.001), cumulated, then the mean over requests: a
    request whose responses have all ended adds 0 and is still counted. The deviations are over
    requests, and the error bar divides E's deviation by itself:
    (|std R / R| + |std E / std E|) ExAccErr.

    Source: ``evaluate_exposure_bias.py`` of the authors' repository.
    """
    gap, deviation = {}, {}
    for author, gaps in (("student", by_student), ("teacher", by_teacher)):
        cumulated = (gaps.nats.sum(1) / (gaps.running.sum(1) + 1e-3)).cumsum(-1)
        gap[author], deviation[author] = cumulated.mean(0), cumulated.std(0)
    excess = _excess_where_defined(gap["student"], gap["teacher"])
    spread = (deviation["student"] / gap["student"]).abs()
    spread = spread + (deviation["teacher"] / deviation["teacher"]).abs()
    return {
        "student_gap": gap["student"],
        "teacher_gap": gap["teacher"],
        "excess": excess,
        "error_bar": spread * excess,
        "student_deviation": deviation["student"],
        "teacher_deviation": deviation["teacher"],
    }


def describe_gaps(by_student: Gaps, by_teacher: Gaps, num_seeds: int = 1) -> dict[str, Any]:
    """Both versions with their intervals, what each seed alone gives, survival and lengths."""
    both = by_student, by_teacher
    by_seed = zip(*(gaps.split(num_seeds) for gaps in both), strict=True)
    return {
        **_with_intervals(*both, per_token=False),
        "excess_by_seed": [numbers(exposure_curve(*pair).excess) for pair in by_seed],
        "survival": _by_author(both, lambda gaps: gaps.survival.tolist()),
        "mean_length": _by_author(both, lambda gaps: gaps.lengths.double().mean().item()),
        "per_token": _with_intervals(*both, per_token=True),
    }


def _with_intervals(by_student: Gaps, by_teacher: Gaps, per_token: bool) -> dict[str, Any]:
    intervals = exposure_intervals(by_student, by_teacher, per_token=per_token)
    return {
        **exposure_curve(by_student, by_teacher, per_token=per_token).to_dict(),
        "intervals": {
            "level": 0.95,
            "num_resamples": NUM_RESAMPLES,
            "resampled": "requests",
            **{
                name: {"low": numbers(low), "high": numbers(high)}
                for name, (low, high) in intervals.items()
            },
        },
    }


def _by_author(both: tuple[Gaps, Gaps], value: Callable[[Gaps], Any]) -> dict[str, Any]:
    return dict(zip(("student", "teacher"), map(value, both), strict=True))


def _excess_where_defined(student_gap: PerStep, teacher_gap: PerStep) -> PerStep:
    defined = teacher_gap > NO_GAP
    excess = torch.full_like(teacher_gap, torch.nan)
    excess[defined] = excess_accumulated_error(student_gap[defined], teacher_gap[defined])
    return excess


def _last_step(by_student: Gaps, by_teacher: Gaps, per_token: bool) -> int:
    """How many steps the curve has."""
    if not per_token:
        return by_student.num_steps
    return min(int(gaps.lengths.max()) for gaps in (by_student, by_teacher))


def numbers(values: Float[Tensor, " steps"]) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
