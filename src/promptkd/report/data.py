"""Reading run directories for the report. No torch.

A run that was stopped, was never evaluated or lost its last line is still worth looking at, so
every file but the recipe may be missing, and what could not be read becomes a note on the page.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from promptkd.errors import UserError
from promptkd.evaluation.results import Evaluation, read_evaluations
from promptkd.files import read_json, read_json_lines

Row = dict[str, Any]
SECTIONS = {"student", "teacher", "method", "data", "sampling", "optimization", "evaluation"}
"""Keys of recipe.yaml that have keys of their own."""
CALLED = {"start": "start", "warm-up": "other", "teacher": "teacher"}
"""Directories of scores whose names say whose they are, and the roles of these models."""


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        label: short and unique among the runs of a report.
        steps: lines of metrics.jsonl about training steps.
        validations: its lines about evaluations: {"step": ..., "evaluation": {score: value}}.
        exposures: its lines about exposure bias: {"step": ..., "exposure_bias": {...}}.
        judgements: what judge/NAME.json hold, by NAME.
        notes: sentences about what could not be read or is not there yet.
        method_of_study: which of a study's methods it trained, with one of its seeds.
    """

    path: Path
    label: str
    recipe: Row
    environment: Row = field(default_factory=dict)
    steps: tuple[Row, ...] = ()
    validations: tuple[Row, ...] = ()
    exposures: tuple[Row, ...] = ()
    samples: tuple[Row, ...] = ()
    summary: Row | None = None
    evaluations: tuple[Evaluation, ...] = ()
    exposure_bias: Row | None = None
    prompt_analysis: Row | None = None
    judgements: dict[str, Row] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    method_of_study: str = ""

    @property
    def method(self) -> str:
        return str((self.recipe.get("method") or {}).get("name", "unknown method"))

    @property
    def kept_step(self) -> int | None:
        """The step whose student was kept: the best validation, else the last one."""
        best = (self.summary or {}).get("best")
        if best:
            return best["step"]
        return self.steps[-1]["step"] if self.steps else None

    def is_at(self, model: str) -> bool:
        """Whether a model's name means this run's student."""
        places = (self.path, self.path / "student", self.recipe.get("output"))
        return any(_same_place(model, place) for place in places if place)


class Named(NamedTuple):
    """An evaluation outside of runs, and the name of its directory."""

    name: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Model:
    """Who is compared: the student of a run, the start of one, a teacher, or something else.

    Attributes:
        role: "run", "start", "teacher" or "other".
        training_seeds: of a method in a study, the evaluation of each of its training seeds.
    """

    label: str
    role: str
    evaluation: Evaluation
    training_seeds: tuple[Evaluation, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """Models that answered the same requests under the same settings.

    Attributes:
        compared: the score that decides, where a study named it.
    """

    name: str
    models: tuple[Model, ...]
    compared: str | None = None

    @property
    def evaluation(self) -> Evaluation:
        """The first model's: its settings are everybody's."""
        return self.models[0].evaluation

    @property
    def of_methods(self) -> bool:
        """Whether it is a study's, with a model per method."""
        return any(model.training_seeds for model in self.models)

    def of_role(self, role: str) -> list[Model]:
        return [model for model in self.models if model.role == role]

    @property
    def beside(self) -> list[Model]:
        """Whom a student is measured by: its start, its warm-up, its teacher."""
        warm_up = [model for model in self.of_role("other") if model.label in CALLED]
        return [*self.of_role("start"), *warm_up, *self.of_role("teacher")]

    def of_run(self, run: Run) -> Model | None:
        return next((m for m in self.of_role("run") if m.label == run.label), None)


def read_run(path: Path, label: str) -> Run:
    """Read what there is of one run.

    Raises:
        UserError: if recipe.yaml isn't one.
    """
    recipe = _read_recipe(path / "recipe.yaml")
    notes: list[str] = []
    rows = read_lines(path / "metrics.jsonl", notes)
    steps = {row["step"]: row for row in rows if "loss" in row}
    validations = {row["step"]: row for row in rows if "evaluation" in row}
    exposures = {row["step"]: row for row in rows if "exposure_bias" in row}
    summary = read_json(path / "summary.json", notes)
    planned = (recipe.get("optimization") or {}).get("max_steps")
    if summary is None:
        of = f" of {planned}" if planned else ""
        notes.append(f"{label} is not finished: it stands at step {max(steps, default=0)}{of}.")
    elif len(steps) < (taken := summary.get("steps", 0)):
        notes.append(
            f"{path}/metrics.jsonl holds {len(steps)} of the {taken} steps that were taken: curves "
            "and costs are of these alone."
        )
    judgements = {
        file.stem: content
        for file in sorted((path / "judge").glob("*.json"))
        if (content := read_json(file, notes)) is not None
    }
    return Run(
        path=path,
        label=label,
        recipe=recipe,
        environment=read_json(path / "environment.json", notes) or {},
        steps=tuple(steps[step] for step in sorted(steps)),
        validations=tuple(validations[step] for step in sorted(validations)),
        exposures=tuple(exposures[step] for step in sorted(exposures)),
        samples=_read_samples(path / "samples.jsonl", validations.keys(), notes),
        summary=summary,
        evaluations=tuple(read_evaluations(path / "evaluation", notes)),
        exposure_bias=read_json(path / "exposure_bias.json", notes),
        prompt_analysis=read_json(path / "prompt_analysis.json", notes),
        judgements=judgements,
        notes=tuple(notes),
    )


def _read_samples(path: Path, evaluated: Collection[int], notes: list[str]) -> tuple[Row, ...]:
    """A few responses of every evaluation, by its step."""
    samples = read_lines(path, notes)
    lost = {*evaluated} - {row["step"] for row in samples}
    if lost and path.exists():
        notes.append(f"{path} lacks the responses of {len(lost)} evaluations.")
    return tuple(samples)


def _read_recipe(path: Path) -> Row:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path} holds no keys, so {path.parent} is not a run of promptkd.")
    if "student" not in recipe:  # the first
        raise UserError(
            f"{path} is no recipe of promptkd: it has no 'student'. Name a directory that promptkd "
            "train made."
        )
    if "output" not in recipe:  # the last key of all
        raise UserError(f"{path} is cut: 'output' is missing. Put a copy of it back.")
    for key in SECTIONS & recipe.keys():
        if not isinstance(recipe[key] or {}, dict):
            raise UserError(f"{path} is damaged: '{key}' has no keys of its own.")
    return recipe


def read_lines(path: Path, notes: list[str]) -> list[Row]:
    """JSON lines; damaged ones are left out and noted."""
    if not path.exists():
        return []
    rows, damaged = read_json_lines(path)
    other = [line for line, row in rows.items() if not isinstance(row.get("step"), int)]
    damaged = sorted([*damaged, *other])
    rows = {line: row for line, row in rows.items() if line not in other}
    if damaged:
        shown = ", ".join(map(str, damaged[:3]))
        notes.append(f"{path}: {len(damaged)} damaged lines are left out (line {shown}).")
    return list(rows.values())


def data_sets(runs: Sequence[Run], others: Iterable[Named] = ()) -> list[DataSet]:
    """Group all evaluations by protocol and name who was evaluated.

    An evaluation below a run's ``evaluation/`` whose model is another one (its teacher, its start)
    counts for that model; one in a directory called start, warm-up or teacher for what it is
    called. Where a model was evaluated twice under one protocol, the first counts.
    """
    groups: dict[str, list[Model]] = {}
    found = [(_who(e.model, runs, run), e) for run in runs for e in run.evaluations]
    found += [(_who(e.model, runs, None, name), e) for name, e in others]
    for (label, role), evaluation in found:
        models = groups.setdefault(evaluation.protocol, [])
        if not any((model.label, model.role) == (label, role) for model in models):
            models.append(Model(label, role, evaluation))
    order = {"run": 0, "start": 1, "other": 2, "teacher": 3}
    labels = [run.label for run in runs]

    def position(model: Model) -> tuple[int, int]:
        return order[model.role], labels.index(model.label) if model.role == "run" else 0

    sets = [
        DataSet(models[0].evaluation.name, tuple(sorted(models, key=position)))
        for models in groups.values()
    ]
    return [s for s in sets if s.of_role("run")] + [s for s in sets if not s.of_role("run")]


def _who(
    model: str, runs: Sequence[Run], owner: Run | None, directory: str = ""
) -> tuple[str, str]:
    for run in runs:
        if run.is_at(model):
            return run.label, "run"
    if directory in CALLED:
        return directory, CALLED[directory]
    roles = {
        role: {str((run.recipe.get(key) or {}).get("model", "")) for run in runs} - {""}
        for role, key in (("teacher", "teacher"), ("start", "student"))
    }
    for role, models in roles.items():
        if any(_same_place(model, other) for other in models):
            return (role if len(models) == 1 else f"{role} {Path(model).name}"), role
    if owner is not None and Path(model).name == owner.path.resolve().name:
        return owner.label, "run"  # the directory was moved after its evaluation
    return Path(model).name or "unnamed model", "other"


def _same_place(model: str, other: str | Path) -> bool:
    return model == str(other) or Path(model).resolve() == Path(other).resolve()
