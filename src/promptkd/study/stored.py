"""What is kept of a study, and its tables and figures made of that alone. No torch.

A study may name a place for its ``results``: there every run leaves what its numbers and figures
are made of, and no weights: recipe, metrics, summary, scores, and its responses, compressed,
without the requests and references that they belong to. Without such a place, all is read where it
was made.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer

from promptkd.data import read_examples
from promptkd.errors import UserError
from promptkd.evaluation.results import (
    Evaluation,
    read_evaluation,
    refuse_partial,
    rows_digest,
)
from promptkd.files import write_bytes, write_json, write_json_lines, write_text
from promptkd.report.cost import cost_of_steps
from promptkd.report.data import read_lines
from promptkd.report.report import report
from promptkd.study.exposure import FILE as EXPOSURE_BIAS
from promptkd.study.exposure import Exposures, measured
from promptkd.study.file import Study
from promptkd.study.findings import Findings, Line
from promptkd.study.power import power_report
from promptkd.study.statement import statement
from promptkd.study.table import Failure, methods_table, study_table

KEPT = ("recipe.yaml", "metrics.jsonl", "summary.json")
"""Files of a run that are kept as they are."""


def keep(study: Study, model: Path, evaluation: Path) -> None:
    """Copy what is kept of a run, the start or the teacher, if the study has a place for it.

    Args:
        model: its directory below the study's output.
        evaluation: where its scores are.
    """
    if study.results is None:
        return
    place = Path(study.results) / model.relative_to(study.output)
    for name in KEPT:
        if (model / name).is_file():
            write_bytes(place / name, (model / name).read_bytes())
    if measured(model, study):
        write_bytes(place / EXPOSURE_BIAS, (model / EXPOSURE_BIAS).read_bytes())
    for found in _read(evaluation, study):
        _save(place / evaluation.relative_to(model), found)


def conclude(study: Study, *, failed: Sequence[Failure] = (), rescore: bool = False) -> Path | None:
    """Make every table and figure of what is stored; print the tables.

    Args:
        failed: runs to be named below the tables, whose scores, if they have some, are old.
        rescore: compute the scores of responses anew, by their references in the study's data.

    Returns:
        The report, None if no run has begun.

    Raises:
        UserError: if nothing is stored, or the data to rescore by is other data.
    """
    lines = stored_lines(study, failed=failed, rescore=rescore)
    tables = _write_tables(study, lines, failed)
    for table in tables:
        typer.echo(f"\n{table}")
    runs = study.place.glob("*/seed-*/recipe.yaml")
    return report(study.place) if any(runs) else None


def power(study: Study, detect: float) -> str:
    """Which sizes of this study would tell a difference apart; see ``study.power``.

    Raises:
        UserError: if no method has scores of two training seeds and two decoding seeds.
    """
    lines, names = stored_lines(study), [*study.evaluation.suite]
    score = Findings.of(lines, names, study.baseline, study.evaluation.metric).compared
    if score is None:
        raise UserError("No score that decides was measured. Name one as evaluation.metric.")
    methods = [label for label in study.methods if label != study.baseline]
    return power_report(lines, names, score, detect=detect, num_comparisons=max(1, len(methods)))


def stored_lines(
    study: Study, *, failed: Sequence[Failure] = (), rescore: bool = False
) -> list[Line]:
    """Methods, start and teacher, with the scores that are stored of them.

    Raises:
        UserError: if there are none, or the data to rescore by is other data.
    """
    lines, old = [], {(failure.label, failure.seed) for failure in failed}
    for label in study.methods:
        seeds = [seed for seed in study.seeds if (label, seed) not in old]
        places = {seed: study.place / label / f"seed-{seed}" for seed in seeds}
        found = {s: _scores(p / "evaluation", study, rescore) for s, p in places.items()}
        whole = {seed: own for seed, own in found.items() if own}
        steps = [
            [row for row in read_lines(places[seed] / "metrics.jsonl", []) if "loss" in row]
            for seed in whole
        ]
        costs = tuple(own for rows in steps if (own := cost_of_steps(rows)))
        lines.append(Line(label, "run", tuple(whole), scores=tuple(whole.values()), costs=costs))
    for role in ("start", "teacher"):
        if own := _scores(study.place / role, study, rescore):
            lines.append(Line(role, role, (), scores=(own,)))
    if not any(line.scores for line in lines):
        raise UserError(
            f"{study.place} holds no scores of all of the study's data sets. Run the study first."
        )
    return lines


def _scores(directory: Path, study: Study, rescore: bool) -> dict[str, Evaluation] | None:
    """Of all data sets; None if one is missing."""
    found = {own.name: own for own in _read(directory, study)}
    if len(found) < len(study.evaluation.suite):
        return None
    return {name: _rescored(own, study) if rescore else own for name, own in found.items()}


def _read(directory: Path, study: Study) -> list[Evaluation]:
    places = (directory / f"{name}.json" for name in study.evaluation.suite)
    found = [_whole(place) for place in places if place.is_file()]
    return [own.also_scored_by(study.evaluation.metrics) for own in found]


def _whole(place: Path) -> Evaluation:
    """Raises UserError for a damaged one: a table without it would be of fewer seeds."""
    notes: list[str] = []
    found = read_evaluation(place, notes)
    if found is None:
        said = notes[0] if notes else f"{place} is no evaluation."
        raise UserError(f"{said} Put a copy of it back, or remove it: the study scores it again.")
    return refuse_partial(place.parent, found)


def _rescored(found: Evaluation, study: Study) -> Evaluation:
    if not any(prediction.references for prediction in found.predictions):
        rows = read_examples(study.evaluation.suite[found.name], study.base_recipe.data.columns)
        found = found.with_references({i: row.responses for i, row in enumerate(rows)})
    return found.scored_anew()


def _save(directory: Path, evaluation: Evaluation) -> None:
    """Write ``NAME.json`` and ``NAME.predictions.jsonl.gz``: what tables and figures are made of.

    Requests and references are left out, because the data may not be anyone's to hand on; their
    digest stays, and ``Evaluation.with_references`` puts the latter back from the data.
    """
    digest = evaluation.rows or rows_digest(evaluation.predictions)
    left_out = ("request", "references")
    rows = (
        {key: value for key, value in prediction.to_row().items() if key not in left_out}
        for prediction in evaluation.predictions
    )
    write_json_lines(directory / f"{evaluation.name}.predictions.jsonl.gz", rows)
    write_json(directory / f"{evaluation.name}.json", replace(evaluation, rows=digest).to_dict())


def _write_tables(study: Study, lines: Sequence[Line], failed: Sequence[Failure]) -> list[str]:
    """Write study.json and the tables; the tables as text, that of all data first."""
    asked, suite = (study.baseline, study.evaluation.metric), [*study.evaluation.suite]
    findings = {name: Findings.of(lines, [name], *asked) for name in suite}
    over_all = Findings.of(lines, suite, *asked) if len(suite) > 1 else None
    shown = [*([over_all] if over_all else []), *findings.values()]
    tables = [study_table(found, len(study.seeds), failed) for found in shown]
    said, first = [statement(found) for found in shown], methods_table(shown[0])
    if exposures := Exposures.of(study):
        tables, said = [*tables, exposures.table()], [*said, ""]
    record = {
        "study": study.model_dump(mode="json"),
        "statements": said,
        "methods_table": asdict(first) if first else None,
        "tables": [asdict(table) for table in tables],
        "over_all": over_all.to_dict() if over_all else None,
        "data": {name: found.to_dict() for name, found in findings.items()},
        "exposure_bias": exposures.to_dict() if exposures else None,
        "failed": [asdict(failure) for failure in failed],
    }
    markdown = [
        f"## {table.title}\n\n{sentences}\n\n{table.to_markdown()}"
        for table, sentences in zip(tables, said, strict=True)
    ]
    for name, text in (
        ("study.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n"),
        ("table.md", "\n".join(markdown)),
        ("table.tex", "\n".join(table.to_latex() for table in tables)),
    ):
        write_text(study.place / name, text)
    return [f"{table.to_text()}\n{words}" for table, words in zip(tables, said, strict=True)]
