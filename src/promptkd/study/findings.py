"""What a study found: scores over requests and training seeds, differences, what is established.

A method's score is the mean over its training seeds; over several data sets it is the mean of
theirs. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from promptkd.criteria import SMALLER_IS_BETTER
from promptkd.evaluation.metrics import METRICS
from promptkd.evaluation.results import Evaluation, Score, totals
from promptkd.evaluation.statistics import mean_and_deviation
from promptkd.evaluation.two_levels import LEVEL, Estimate, estimate, holm
from promptkd.report.comparisons import headline
from promptkd.report.cost import TrainingCost
from promptkd.report.data import DataSet, Model

SHARES = (*METRICS, "ended")
"""Scores in percent."""


@dataclass(frozen=True)
class Line:
    """One line of every table: a method, the start or the teacher.

    Attributes:
        role: "run", "start" or "teacher".
        seeds: the training seeds that succeeded; empty for start and teacher.
        scores: by data set, one per training seed; the only ones of start and teacher.
        costs: what training took, one per training seed where it is known.
    """

    label: str
    role: str
    seeds: tuple[int, ...]
    scores: tuple[Mapping[str, Evaluation], ...]
    costs: tuple[TrainingCost, ...] = ()

    def of_seeds(self, seeds: Sequence[int]) -> "Line":
        """With these training seeds alone; start and teacher have none, and stay."""
        if self.role != "run":
            return self
        places = [self.seeds.index(seed) for seed in seeds]
        own = tuple(self.scores[place] for place in places)
        return Line(self.label, self.role, tuple(seeds), scores=own)

    def protocols(self, names: Sequence[str]) -> set[tuple[str, ...]]:
        return {tuple(own[name].protocol for name in names) for own in self.scores}


@dataclass(frozen=True)
class Gain:
    """A line's score minus the baseline's.

    Attributes:
        p_corrected: by Holm, over the methods that are compared with the baseline in this score;
            None for start and teacher, whose differences are no hypotheses of the study.
        num_comparisons: how many these are.
    """

    label: str
    score: str
    estimate: Estimate
    p_corrected: float | None
    num_comparisons: int

    @property
    def established(self) -> bool:
        return self.p_corrected is not None and self.p_corrected < LEVEL

    @property
    def detectable(self) -> float:
        return self.estimate.detectable(self.num_comparisons)

    def to_dict(self, baseline: str) -> dict[str, Any]:
        low, high = self.estimate.interval_95
        return {
            "first": self.label,
            "second": baseline,
            "score": self.score,
            "difference": self.estimate.value,
            "low": low,
            "high": high,
            "standard_error": self.estimate.standard_error,
            "degrees_of_freedom": self.estimate.degrees_of_freedom,
            "num_requests": self.estimate.num_requests,
            "num_training_seeds": self.estimate.num_seeds,
            "p": self.estimate.p_value,
            "p_corrected": self.p_corrected,
            "established": self.established if self.p_corrected is not None else None,
            "detectable": self.detectable,
        }


@dataclass(frozen=True)
class Findings:
    """One data set of a study, or the mean over several.

    Attributes:
        names: of the data sets.
        compared: the score that decides.
        scores: by label; None where every run failed.
        gains: by label and score; empty without a baseline that was asked the same.
        best: who is better than every other method, Holm-corrected; None if nobody is.
    """

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    baseline: str
    compared: str | None
    scores: dict[str, dict[str, Score] | None]
    gains: dict[str, dict[str, Gain]]
    best: str | None

    @classmethod
    def of(
        cls, lines: Sequence[Line], names: Sequence[str], baseline: str, metric: str | None = None
    ) -> "Findings":
        """Args: metric: the score that decides; what suits the first data set if not given."""
        scores = {line.label: _scores(line, names) if line.scores else None for line in lines}
        scored = {line.label: line for line in lines if line.scores}
        first = next((own[names[0]] for line in scored.values() for own in line.scores), None)
        if first and metric is None:
            metric = headline(DataSet(names[0], (Model(baseline, "other", first),)))
        known = [name for own in scores.values() if own for name in own]
        methods = [line for line in scored.values() if line.role == "run"]
        return cls(
            names=tuple(names),
            lines=tuple(lines),
            baseline=baseline,
            compared=metric if metric in known else None,
            scores=scores,
            gains=_gains(scored, names, baseline, dict.fromkeys(known)),
            best=_best(methods, names, metric, scores) if metric in known else None,
        )

    @property
    def title(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"mean of {len(self.names)} data sets"

    @property
    def data(self) -> DataSet | None:
        """The first data set with its first model, for its settings in words."""
        for line in self.lines:
            for own in line.scores:
                return DataSet(self.names[0], (Model(line.label, line.role, own[self.names[0]]),))
        return None

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known, for study.json."""
        record = self.data.evaluation.to_dict() if self.data else {}
        left_out = ("model", "scores", *(("data", "num_examples") if len(self.names) > 1 else ()))
        return {
            "data_sets": list(self.names),
            "settings": {k: v for k, v in record.items() if k not in left_out},
            "models": [
                {
                    "label": line.label,
                    "role": line.role,
                    "training_seeds": list(line.seeds),
                    "scores": None if own is None else {k: v.to_dict() for k, v in own.items()},
                }
                for line, own in zip(self.lines, self.scores.values(), strict=True)
            ],
            "compared": self.compared,
            "best": self.best,
            "differences": [
                gain.to_dict(self.baseline) for own in self.gains.values() for gain in own.values()
            ],
        }


def _scores(line: Line, names: Sequence[str]) -> dict[str, Score]:
    """Of every name that all seeds have on all data sets."""
    known = dict.fromkeys(
        score for own in line.scores for name in names for score in own[name].scores
    )
    found = {}
    for score in known:
        means = [own[name].mean(score) for own in line.scores for name in names]
        if None in means:
            continue
        by_seed = [fmean(own[name].scores[score].mean for name in names) for own in line.scores]
        mean, deviation = mean_and_deviation(by_seed)
        measured = _totals(line, names, score)
        low, high = estimate(measured[1]).interval_95 if measured else (0.0, 0.0)
        if score in SHARES:  # where a t-interval may go beyond what there is
            low, high = max(low, 0.0), min(high, 100.0)
        found[score] = Score(
            mean=mean,
            num_requests=sum(map(len, measured[0])) if measured else None,
            interval_95=(low, high) if measured else None,
            by_seed=tuple(by_seed),
            deviation_over_seeds=deviation if len(by_seed) > 1 else None,
        )
    return found


def _totals(
    line: Line, names: Sequence[str], score: str
) -> tuple[list[list[int]], list[np.ndarray]] | None:
    """Per data set the requests' rows and (seeds, requests, 2) sums and counts.

    None where no response has the score, or where seeds were asked different requests.
    """
    rows, arrays = [], []
    for name in names:
        found = [totals(own[name].predictions, score) for own in line.scores]
        if not found[0] or any(own.keys() != found[0].keys() for own in found):
            return None
        rows.append([*found[0]])
        arrays.append(np.array([[*own.values()] for own in found]))
    return rows, arrays


def _difference(own: Line, other: Line, names: Sequence[str], score: str) -> Estimate | None:
    """Paired by request and, where both are methods, by training seed; None if they can't be."""
    if own.role == other.role == "run":
        common = [seed for seed in own.seeds if seed in other.seeds]
        if not common:
            return None
        own, other = own.of_seeds(common), other.of_seeds(common)
    if len(own.protocols(names) | other.protocols(names)) != 1:
        return None
    ours, theirs = _totals(own, names, score), _totals(other, names, score)
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return None
    if len(ours[1][0]) == 1:  # the seeds are the other's
        found = estimate(theirs[1], ours[1])
        return Estimate(**{**found.__dict__, "value": -found.value})
    return estimate(ours[1], theirs[1])


def _gains(
    scored: Mapping[str, Line], names: Sequence[str], baseline: str, scores: Sequence[str] | Any
) -> dict[str, dict[str, Gain]]:
    if baseline not in scored:
        return {}
    other, gains = scored[baseline], {label: {} for label in scored if label != baseline}
    for score in scores:
        found = {
            label: difference
            for label, own in scored.items()
            if own is not other
            and (difference := _difference(own, other, names, score)) is not None
        }
        methods = [label for label in found if scored[label].role == "run"]
        corrected = holm([found[label].p_value for label in methods])
        p_corrected = dict(zip(methods, corrected, strict=True))
        for label, difference in found.items():
            gains[label][score] = Gain(
                label=label,
                score=score,
                estimate=difference,
                p_corrected=p_corrected.get(label),
                num_comparisons=max(1, len(methods)),
            )
    return {label: own for label, own in gains.items() if own}


def _best(
    methods: Sequence[Line],
    names: Sequence[str],
    score: str | None,
    scores: Mapping[str, dict[str, Score] | None],
) -> str | None:
    means = {m.label: own[score] for m in methods if (own := scores[m.label]) and score in own}
    if score is None or len(means) < 2:
        return None
    sign = -1 if score in SMALLER_IS_BETTER else 1
    leader = max(means, key=lambda label: sign * means[label].mean)
    (own,) = (m for m in methods if m.label == leader)
    found = [
        _difference(own, m, names, score) for m in methods if m.label in means and m is not own
    ]
    if any(difference is None or sign * difference.value <= 0 for difference in found):
        return None
    corrected = holm([difference.p_value for difference in found if difference])
    return leader if all(p < LEVEL for p in corrected) else None
