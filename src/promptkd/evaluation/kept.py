"""Evaluations on disk: written whole, never over something else, and not made twice. No torch."""

from pathlib import Path

from promptkd.errors import UserError
from promptkd.evaluation.results import Evaluation, read_evaluation
from promptkd.files import read_json, write_json, write_json_lines


def save_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Write ``NAME.json`` and ``NAME.predictions.jsonl``, the latter first.

    Raises:
        UserError: as ``refuse_to_replace``, or if there is no space.
    """
    place = directory / f"{evaluation.name}.json"
    refuse_to_replace(place, len(evaluation.predictions))
    rows = (prediction.to_row() for prediction in evaluation.predictions)
    write_json_lines(directory / f"{evaluation.name}.predictions.jsonl", rows)
    write_json(place, evaluation.to_dict())


def refuse_to_replace(place: Path, num_responses: int) -> None:
    """Refuse a place that holds more responses, or a JSON file that is no evaluation.

    Raises:
        UserError: naming the file.
    """
    kept = read_evaluation(place) if place.is_file() else None
    if kept and len(kept.predictions) > num_responses:
        raise UserError(
            f"{place} holds {len(kept.predictions)} responses, and this evaluation has only "
            f"{num_responses}: it would replace a larger one. Give another --output, or remove "
            "that file."
        )
    others = None if kept or not place.is_file() else read_json(place, [])
    if others and "decoding" not in others:  # what is damaged is nothing to keep
        raise UserError(
            f"{place} is no evaluation (it holds {', '.join(list(others)[:3])}), and would be "
            "replaced by one. Give another --output, or name the data otherwise (--suite)."
        )


def kept_evaluation(place: Path, asked: str | None) -> Evaluation | None:
    """What was written by an evaluation of the same models on the same questions, if all of it is.

    Args:
        place: NAME.json.
        asked: see ``Questions.digests``.
    """
    kept = read_evaluation(place) if asked and place.is_file() else None
    return kept if kept and kept.asked == asked and not kept.num_lost else None
