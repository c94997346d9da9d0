"""What a path given to the report stands for: a run, a study, a whole path, or scores alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from promptkd.errors import UserError
from promptkd.evaluation.named_models import models_of_distillation
from promptkd.evaluation.results import read_evaluation
from promptkd.files import read_json
from promptkd.report.data import DataSet, Named, Run, data_sets, read_run
from promptkd.report.pooling import by_method
from promptkd.report.study import StudyOutline, read_study
from promptkd.run import lacks_of_run


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        others: evaluations of models that are no run of it, each with its directory's name.
        study: if the runs are one.
        seconds: of a whole path, by stage.
    """

    runs: list[Run]
    others: list[Named] = field(default_factory=list)
    study: StudyOutline | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def data_sets(self) -> list[DataSet]:
        """What was evaluated alike, by data set; a study's methods in place of its runs."""
        sets = data_sets(self.runs, self.others)
        if self.study is None:
            return sets
        return by_method(sets, self.runs, self.study)


def read_subject(paths: Sequence[Path]) -> Subject:
    """Read what the paths stand for.

    Raises:
        UserError: if a path is nothing that a report can be made of, or none holds a run.
    """
    if any((path / "study.json").is_file() for path in paths):
        if len(paths) > 1:
            raise UserError("A study is reported by itself: name it alone, or its runs.")
        return _read_study(paths[0])
    run_paths: list[Path] = []
    others: list[Named] = []
    seconds: dict[str, float] = {}
    for path in paths:
        if (path / "order.json").is_file():
            run_paths.append(_last_run(path))
            others += _evaluations_below(path / "scores")
            seconds |= _seconds(path / "stages")
        elif (path / "recipe.yaml").is_file():
            run_paths.append(path)
        else:
            found = _evaluations_below(path)
            if not found:
                raise UserError(
                    f"{path} is neither a run nor a study, a whole path, or a directory of scores, "
                    "as promptkd train, study, distill and evaluate make them: "
                    f"{lacks_of_run(path)}."
                )
            others += found
    for path in run_paths:
        if lacking := lacks_of_run(path):
            raise UserError(f"{path} leaves nothing to report: {lacking}.")
    if not run_paths:
        raise UserError("A report needs a run, but only scores were named. Add a run's directory.")
    return Subject(_read_runs(run_paths), others, seconds=seconds if len(run_paths) == 1 else {})


def _last_run(path: Path) -> Path:
    """The run of a whole path that made its student.

    Raises:
        UserError: if it isn't planned, or hasn't begun.
    """
    models = models_of_distillation(path)
    run = path / [*models][-2] if models else None  # the last but the teacher
    if run is None or lacks_of_run(run):
        raise UserError(
            f"{path} is a whole path that hasn't come to its student yet. Give the same promptkd "
            "distill again: it goes on where it stopped, and ends with the report."
        )
    return run


def _read_study(path: Path) -> Subject:
    outline = read_study(path)
    places = {
        place: method
        for method in outline.methods
        for seed in outline.seeds
        if ((place := path / method / f"seed-{seed}") / "recipe.yaml").is_file()
    }
    if not places:
        raise UserError(f"{path} is a study of which no run was begun yet.")
    runs = [
        replace(run, method_of_study=method)
        for run, method in zip(_read_runs([*places]), places.values(), strict=True)
    ]
    others = [n for role in ("start", "teacher") for n in _evaluations_below(path / role)]
    return Subject(runs, others, outline)


def _read_runs(paths: Sequence[Path]) -> list[Run]:
    return [read_run(p, label) for p, label in zip(paths, _labels(paths), strict=True)]


def _evaluations_below(directory: Path) -> list[Named]:
    found = ((file, read_evaluation(file)) for file in sorted(directory.rglob("*.json")))
    return [Named(file.parent.name, e) for file, e in found if e is not None]


def _seconds(directory: Path) -> dict[str, float]:
    """What each finished stage of a whole path took, in their order."""
    marks = sorted(directory.glob("*.done.json"), key=lambda f: int(f.name.partition("-")[0]))
    found = {mark.name.partition("-")[2].removesuffix(".done.json"): mark for mark in marks}
    records = {name: read_json(mark, []) for name, mark in found.items()}
    return {name: own["seconds"] for name, own in records.items() if own and "seconds" in own}


def _labels(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]).lstrip("/") for p in parts]
