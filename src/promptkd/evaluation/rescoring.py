"""Scores of kept predictions, computed anew without generating. No torch."""

from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.results import own_evaluations, save_evaluation


def rescore(directory: str | Path, notes: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Compute the scores of kept predictions anew, without generating.

    What needs models stays as it is, and so does what a user's own function gave.

    Args:
        directory: a run's, or the output of ``evaluate``.
        notes: takes a sentence for every damaged file.

    Returns:
        What each ``NAME.json`` holds now, by NAME, or FOLDER/NAME for other models' below.

    Raises:
        UserError: if there are no predictions.
    """
    place = Path(directory)
    if (place / "evaluation").is_dir():
        place = place / "evaluation"
    results = {}
    for folder in (place, *sorted(path for path in place.rglob("*") if path.is_dir())):
        for found in own_evaluations(folder, notes):
            if found.predictions:
                again = found.scored_anew()
                save_evaluation(folder, again)
                results[str((folder / found.name).relative_to(place))] = again.to_dict()
    if not results:
        raise UserError(f"{directory} holds no predictions. Name a run that was evaluated.")
    return results
