"""Scores of kept predictions, computed anew without generating. No torch."""

from pathlib import Path

from promptkd.bars import progress_bar
from promptkd.errors import UserError
from promptkd.evaluation.kept import save_evaluation
from promptkd.evaluation.records import Scores, ScoresByData
from promptkd.evaluation.results import own_evaluations, refuse_partial
from promptkd.run import Place, lacks_of_run


def rescore(directory: Place, notes: list[str] | None = None) -> ScoresByData:
    """Compute the scores of kept predictions anew, without generating.

    What needs models stays as it is, and so does what a user's own function gave.

    Args:
        directory: a run's, or the output of ``evaluate``.
        notes: takes a sentence for every damaged file.

    Returns:
        What each ``NAME.json`` holds now, by NAME, or FOLDER/NAME for other models' below.

    Raises:
        UserError: if there are no predictions, or not all that were scored.
    """
    place, notes = Path(directory), [] if notes is None else notes
    if not place.is_dir():
        raise UserError(f"{place} holds no predictions: {lacks_of_run(place)}.")
    if (place / "evaluation").is_dir():
        place = place / "evaluation"
    folders = (place, *sorted(path for path in place.rglob("*") if path.is_dir()))
    found = [(f, own) for f in folders for own in own_evaluations(f, notes) if own.predictions]
    kept = [(folder, refuse_partial(folder, own)) for folder, own in found]
    results = ScoresByData()
    with progress_bar(kept, desc="scoring anew", unit="evaluation") as shown:
        for folder, found in shown:
            again = found.scored_anew()
            save_evaluation(folder, again)
            results[str((folder / found.name).relative_to(place))] = Scores(again.to_dict())
    if not results:
        damaged = f"{notes[0]} " if notes else ""
        raise UserError(
            f"{damaged}{directory} holds no predictions. Name a run that was evaluated."
        )
    return results
