"""A study's table per data set: means over training seeds, intervals, differences. No torch.

A method's score is the mean over its training seeds, beside their standard deviation. Intervals
and paired differences are over requests: a request's score is its mean over training and decoding
seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from promptkd.evaluation.comparison import Difference, differences
from promptkd.evaluation.results import Evaluation, Score
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import (
    best_model,
    between,
    decoding_words,
    describe,
    headline,
    score_name,
    shown_scores,
    statement,
)
from promptkd.report.data import DataSet, Model
from promptkd.report.numbers import digits, plain
from promptkd.report.pooling import pooled
from promptkd.report.tables import comparison_cell

HIDDEN = ("exact_match", "cross_entropy")
"""Left out of the table; study.json has them."""


@dataclass(frozen=True)
class Failure:
    """A run that ended in an error, and its sentence."""

    label: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Line:
    """One line of every table: a method, the start or the teacher.

    Attributes:
        role: "run", "start" or "teacher".
        seeds: the training seeds that succeeded; empty for start and teacher.
        scores: by data set, one per training seed; the only ones of start and teacher.
    """

    label: str
    role: str
    seeds: tuple[int, ...]
    scores: tuple[Mapping[str, Evaluation], ...]

    def model(self, name: str) -> Model | None:
        """All seeds as one model, so that the report's findings apply; None if all failed."""
        if not self.scores:
            return None
        return pooled(self.label, self.role, [own[name] for own in self.scores])


@dataclass(frozen=True)
class Findings:
    """One data set of a study.

    Attributes:
        models: by label; None where every run failed.
        gains: differences to the baseline by label, those of every score that both have.
    """

    name: str
    lines: tuple[Line, ...]
    baseline: str
    models: dict[str, Model | None]
    gains: dict[str, tuple[Difference, ...]]

    @classmethod
    def of(cls, lines: Sequence[Line], name: str, baseline: str) -> "Findings":
        models = {line.label: line.model(name) for line in lines}
        other = models[baseline]
        gains = {
            label: tuple(differences(model.evaluation, other.evaluation))
            for label, model in models.items()
            if model and other and model is not other
            if model.evaluation.protocol == other.evaluation.protocol
        }
        return cls(name, tuple(lines), baseline, models, gains)

    @property
    def data(self) -> DataSet:
        return DataSet(self.name, tuple(model for model in self.models.values() if model))

    @property
    def statement(self) -> str:
        """What the report of the study says, too."""
        return " ".join(statement(self.data, self.baseline)) if self.data.models else ""

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known, for study.json."""
        record = self.data.evaluation.to_dict()
        return {
            "settings": {k: v for k, v in record.items() if k not in ("model", "scores")},
            "statement": self.statement,
            "models": [
                {
                    "label": line.label,
                    "role": line.role,
                    "training_seeds": list(line.seeds),
                    "scores": model.evaluation.to_dict()["scores"] if model else None,
                }
                for line, model in zip(self.lines, self.models.values(), strict=True)
            ],
            "differences": [
                {"first": label, "second": self.baseline, "score": row.score}
                | {key: asdict(row)[key] for key in ("difference", "low", "high", "num_requests")}
                for label, rows in self.gains.items()
                for row in rows
            ],
        }


def study_table(findings: Findings, num_seeds: int, failed: Sequence[Failure]) -> Table:
    """Methods, start and teacher on one data set, each against the baseline."""
    data, baseline = findings.data, findings.baseline
    runs, compared = data.of_role("run"), headline(data) if data.models else None
    shown = [s for s in shown_scores(data) if s == compared or s not in HIDDEN]
    best = best_model(runs, compared) if compared else None
    headings, rows = ["Model", "Seeds", *map(score_name, shown)], []
    place = 1 + shown.index(compared) if compared else 0
    if compared:
        headings.insert(2 + place, f"{score_name(compared)} − {baseline}")
    for line in findings.lines:
        model = findings.models[line.label]
        scores = model.evaluation.scores if model else {}
        cells = [
            _cell(s, scores[s], s == compared and best == line.label) if s in scores else Cell("–")
            for s in shown
        ]
        if compared:
            cells.insert(place, _gain(findings, line.label, compared))
        rows.append((Cell(line.label), Cell(_seeds(line, num_seeds)), *cells))
    caption = (
        f"{describe(data)}; {decoding_words(data.evaluation)}. ±: standard deviation over training "
        "seeds. Square brackets: 95% bootstrap interval over requests; it does not cover what "
        "other training seeds would change."
    )
    if compared:
        caption += " Differences are paired by request."
    if len(runs) > 1 and compared:
        caption += (
            " Bold: better than every other method, each difference shown; "
            "intervals are not corrected for the number of comparisons."
        )
    for failure in failed:
        caption += f" Failed: {failure.label}, seed {failure.seed}: {failure.reason}"
    return Table(
        name="table", title=data.name, caption=caption, headings=tuple(headings), rows=tuple(rows)
    )


def _seeds(line: Line, num_planned: int) -> str:
    if line.role != "run":
        return "–"
    done = len(line.seeds)
    if done == num_planned:
        return str(done)
    return f"{done} of {num_planned}" if done else "failed"


def _gain(findings: Findings, label: str, score: str) -> Cell:
    model, other = findings.models[label], findings.models[findings.baseline]
    if label == findings.baseline or model is None:
        return Cell("–")
    alike = other and model.evaluation.protocol == other.evaluation.protocol
    return comparison_cell(between(model, other, score) if other and alike else None)


def _cell(name: str, score: Score, best: bool) -> Cell:
    number = digits if name == "reverse_kl_to_teacher" else plain
    mean = number(score.mean)
    decimals = len(mean.partition(".")[2])
    deviation, interval = score.deviation_over_seeds, score.interval_95
    spread = "" if deviation is None else f" ± {deviation:.{decimals}f}"
    detail = f"[{number(interval[0])}, {number(interval[1])}]" if interval else ""
    return Cell(mean + spread, detail, best)
