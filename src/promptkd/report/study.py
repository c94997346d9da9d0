"""What study.json says. The report of a study repeats it and judges nothing by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.results import Score
from promptkd.files import read_json
from promptkd.report.cells import Table
from promptkd.report.comparisons import score_name
from promptkd.report.data import Row
from promptkd.report.figures import Figure, intervals
from promptkd.report.tables import safe_name

EXPOSURE_BIAS = "exposure-bias"
"""The name of a study's table that stands in a section of its own."""


@dataclass(frozen=True)
class StudyScores:
    """One data set of a study, or the mean over several.

    Attributes:
        compared: the score that decides.
        scores: by label; of methods they are means over the training seeds that count.
        training_seeds: which those are.
        differences: what study.json holds of the methods' differences to the baseline.
    """

    title: str
    compared: str | None
    scores: dict[str, dict[str, Score]]
    training_seeds: dict[str, tuple[int, ...]]
    differences: tuple[Row, ...]

    @classmethod
    def of_record(cls, record: Row) -> "StudyScores":
        names = record["data_sets"]
        return cls(
            title=names[0] if len(names) == 1 else f"mean of {len(names)} data sets",
            compared=record["compared"],
            scores={
                model["label"]: {name: Score.of_dict(own) for name, own in model["scores"].items()}
                for model in record["models"]
                if model["scores"]
            },
            training_seeds={m["label"]: tuple(m["training_seeds"]) for m in record["models"]},
            differences=tuple(
                row
                for row in record["differences"]
                if row["score"] == record["compared"] and row["established"] is not None
            ),
        )


@dataclass(frozen=True)
class StudyOutline:
    """What a study compared and what came of it.

    Attributes:
        statements: in words; of the mean over all data sets first where there are several.
        methods_table: each method's score that decides, on what the first statement is about.
        tables: those of table.md.
        scores: as the tables, of the mean first.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    statements: tuple[str, ...]
    methods_table: Table | None
    tables: tuple[Table, ...]
    scores: tuple[StudyScores, ...]

    def on(self, data: str) -> StudyScores | None:
        """The scores on one data set."""
        return next((own for own in self.scores if own.title == data), None)


def read_study(path: Path) -> StudyOutline:
    """Read PATH/study.json.

    Raises:
        UserError: if it is damaged, or of an earlier version.
    """
    record: dict[str, Any] = read_json(path / "study.json", []) or {}
    asked = record.get("study", {})
    if not asked or "tables" not in record:
        state = "of an earlier version" if asked else "damaged"
        raise UserError(
            f"{path}/study.json is {state}. Make it anew: promptkd study FILE --table-only"
        )
    first, found = record["methods_table"], [*record["data"].values()]
    over_all = [record["over_all"]] if record["over_all"] else []
    return StudyOutline(
        methods=tuple(asked["methods"]),
        seeds=tuple(asked["seeds"]),
        baseline=asked["baseline"],
        statements=tuple(filter(None, record["statements"])),
        methods_table=Table.of_dict(first) if first else None,
        tables=tuple(map(Table.of_dict, record["tables"])),
        scores=tuple(map(StudyScores.of_record, [*over_all, *found])),
    )


def difference_figures(study: StudyOutline, directory: Path) -> list[Figure]:
    """Every method's difference to the baseline, with its interval: one figure per table."""
    made = []
    for found in study.scores:
        rows = [_difference(row) for row in found.differences]
        if not rows:
            continue
        score = score_name(found.compared or "")
        figure = intervals(
            directory,
            f"differences-{safe_name(found.title)}",
            f"Differences to {study.baseline}: {found.title}",
            f"{_in_words(found.differences)}. Bars: 95% intervals over requests and training "
            "seeds; grey is not established.",
            rows,
            unit=f"{score}, minus {study.baseline}'s",
        )
        made.append(figure)
    return made


def _difference(row: Row) -> tuple[str, float, float, float, int]:
    slot = 0 if row["established"] else 5
    return row["first"], row["difference"], row["low"], row["high"], slot


def _in_words(differences: Sequence[Row]) -> str:
    names = [row["first"] for row in differences if row["established"]]
    if not names:
        return "None is established"
    return f"Established: {', '.join(names)}"
