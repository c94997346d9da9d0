"""The models that belong to a run, by name: its start, its teacher, and ``distill``'s others."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from promptkd.config import read_keys
from promptkd.errors import UserError
from promptkd.keys import suggest
from promptkd.run import Place, TrainedRun, lacks_of_run


def run_of(place: Place) -> TrainedRun:
    """The run that is meant: itself, or the one that ``distill`` made its student by.

    Raises:
        UserError: if it is neither a run nor made by ``distill``.
    """
    directory = Path(place)
    if (directory / "recipe.yaml").is_file():
        return TrainedRun.of(place)
    models = models_of_distillation(directory)
    if models:
        *_, student, _ = models.values()  # the order of distillation.plan: the teacher is last
        return TrainedRun.of(student)
    raise UserError(
        f"{directory} is neither a run nor a directory of promptkd distill: "
        f"{lacks_of_run(directory)}."
    )


def named_models(run: TrainedRun, names: Sequence[str]) -> dict[str, str]:
    """Models by name, in the order of the names.

    Raises:
        UserError: for a name that the run doesn't know, with those that it knows.
    """
    known = {"start": run.recipe.student.model}
    if run.recipe.teacher:
        known["teacher"] = run.recipe.teacher_model(run.path)
    of_all = models_of_distillation(run.path.parent)
    known |= {name: model for name, model in of_all.items() if Path(model) != run.path}
    for name in names:
        if name not in known:
            raise UserError(f"{run.path} has no model '{name}'{suggest(name, [*known])}")
    return {name: known[name] for name in names}


def models_of_distillation(directory: Path) -> Mapping[str, str]:
    """The models that the stage ``scores`` of ``distill`` asks, the teacher last; none elsewhere.

    Raises:
        UserError: if the stage is damaged.
    """
    for stage in (directory / "stages").glob("*-scores.yaml"):
        models = read_keys(stage, "Stage").get("models")
        if not isinstance(models, dict) or len(models) < 2:
            raise UserError(f"Stage {stage} is damaged: it names no models. Put a copy back.")
        return {str(name): str(model) for name, model in models.items()}
    return {}
