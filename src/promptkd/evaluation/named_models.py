"""The models that belong to a run, by name: its start, its teacher, and ``distill``'s others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from promptkd.config import load_recipe, read_keys
from promptkd.errors import UserError
from promptkd.keys import suggest


def run_of(directory: Path) -> Path:
    """The run that is meant: itself, or the one that ``distill`` made its student by.

    Raises:
        UserError: if it is neither a run nor made by ``distill``.
    """
    if (directory / "recipe.yaml").is_file():
        return directory
    models = _of_distillation(directory)
    if models:
        *_, student, _ = models.values()  # the order of distillation.plan: the teacher is last
        return Path(student)
    raise UserError(
        f"{directory} is neither a run (no recipe.yaml) nor a directory of promptkd distill, so "
        "no models belong to it by name."
    )


def named_models(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Models by name, in the order of the names.

    Raises:
        UserError: for a name that the run doesn't know, with those that it knows.
    """
    recipe = load_recipe(run / "recipe.yaml")
    known = {"start": recipe.student.model}
    if recipe.teacher:
        known["teacher"] = recipe.teacher_model(run)
    of_all = _of_distillation(run.parent)
    known |= {name: model for name, model in of_all.items() if Path(model) != run}
    for name in names:
        if name not in known:
            raise UserError(f"{run} has no model '{name}'{suggest(name, [*known])}")
    return {name: known[name] for name in names}


def _of_distillation(directory: Path) -> Mapping[str, str]:
    """The models that the stage ``scores`` of ``distill`` asks; none elsewhere."""
    for stage in (directory / "stages").glob("*-scores.yaml"):
        return read_keys(stage, "Stage").get("models", {})
    return {}
