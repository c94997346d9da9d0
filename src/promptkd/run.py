"""A run, as ``train`` returns it and as other verbs take it in place of its directory. No torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from promptkd.config import Recipe, load_recipe
from promptkd.errors import UserError
from promptkd.files import read_json, read_json_lines

Place = str | os.PathLike[str]
"""Of a run: its directory, or the run itself."""
LEFT = ("environment.json", "metrics.jsonl", "summary.json", "student", "evaluation", "checkpoints")
"""What a run that has begun leaves beside its recipe."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's directory and what is in it (docs/run-directory.md).

    It goes wherever a run's path goes. Models and rows that came as objects are still in its
    recipe: the teacher that a run was made with is there to be measured against.

    Attributes:
        path: the directory.
        recipe: as it ran.
    """

    path: Path
    recipe: Recipe = field(repr=False)

    @classmethod
    def of(cls, place: Place) -> "TrainedRun":
        """A run by its directory, whose recipe is read; a run as it is.

        Raises:
            UserError: if there is no recipe that can be read.
        """
        if isinstance(place, cls):
            return place
        file = Path(place) / "recipe.yaml"
        try:
            return cls(Path(place), load_recipe(file))
        except UserError as error:
            named = "" if str(file) in str(error) else f"{file}: "
            raise UserError(f"{named}{error}") from None

    @classmethod
    def finished(cls, place: Place) -> "TrainedRun":
        """The same of a run that has a student.

        Raises:
            UserError: saying what stands there instead.
        """
        path = Path(place)
        if lacking := lacks_of_run(path, finished=True):
            raise UserError(f"{path} is not a finished run: {lacking}.")
        return cls.of(place)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def student(self) -> Path:
        """Loads with transformers."""
        return self.path / "student"

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; empty while the run isn't finished."""
        return read_json(self.path / "summary.json", []) or {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``: one per step, and one per evaluation."""
        return list(read_json_lines(self.path / "metrics.jsonl")[0].values())

    @property
    def start_scores(self) -> dict[str, float]:
        """Of the student before its first step, on the validation data."""
        return next((row["evaluation"] for row in self.metrics if "evaluation" in row), {})

    @property
    def scores(self) -> dict[str, float]:
        """Of the student that was kept, on the validation data."""
        return (self.summary.get("best") or {}).get("scores", {})

    @property
    def outcome(self) -> str:
        """What came of it, in a sentence."""
        best, start = self.summary.get("best"), self.start_scores
        if not best:
            return f"{self.summary.get('steps')} steps; {self.path}"
        changes = [
            f"{name} {start[name]:.3f} -> {value:.3f}"
            for name, value in best["scores"].items()
            if name in start
        ]
        return f"kept step {best['step']}; on the validation data {', '.join(changes)}"

    def __repr__(self) -> str:
        return f"{self.recipe.method.name} run in {self.path}: {self.outcome}"


def lacks_of_run(path: Path, *, finished: bool = False) -> str:
    """Why a path is no run, or no finished one, and what to name instead; "" if it is."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        return f"it {what}. Name a run's directory"
    if (path / "recipe.yaml").is_file():
        again = f"promptkd train {path / 'recipe.yaml'}"
        if not any((path / name).exists() for name in LEFT):
            try:
                load_recipe(path / "recipe.yaml")
            except UserError as error:
                return f"its recipe.yaml is none of promptkd's: {error}".partition("\n")[0].rstrip(
                    "."
                )
            return f"it has no student/ yet, only a recipe: it hasn't begun. Begin it: {again}"
        if not finished or any((path / "student").glob("*")):
            return ""
        if (path / "student").is_dir() or (path / "summary.json").exists():
            return "its student/ was emptied or removed. Put a copy of it back, or train it again"
        return f"it has no student/ yet. Let its training finish: {again}"
    if runs := runs_in(path):
        several = f"{len(runs)} runs, such as {runs[0]}" if len(runs) > 1 else f"the run {runs[0]}"
        return f"it has no recipe.yaml, but holds {several}. Name that"
    around = next(filter(_begun, path.absolute().parents), None)
    if around:
        return f"it is a part of the run {around}. Name that"
    if (path / "config.json").is_file():
        return "it is a model (config.json), and no run was made here (no recipe.yaml)"
    return "it has no recipe.yaml. Name a directory that was made by promptkd train"


def runs_in(path: Path) -> list[Path]:
    """The runs of a study, of a whole path, or of any directory of runs."""
    return [place for depth in ("*", "*/*") for place in sorted(path.glob(depth)) if _begun(place)]


def _begun(path: Path) -> bool:
    return (path / "recipe.yaml").is_file() and (path / "environment.json").is_file()
