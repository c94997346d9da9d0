"""Responses kept with their scores: summed up, saved, scored again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.metrics import (
    SCORED,
    bootstrap_interval,
    exact_match,
    mean_and_deviation,
    rouge_l,
)
from promptkd.files import read_json_lines, write_json, write_json_lines


@dataclass(frozen=True)
class Prediction:
    """One response to one request, with its scores.

    Attributes:
        index: the request's row in its data, from 0.
        ended: whether the model stopped by itself within the limit.
        rouge_l: in percent; None without references.
        exact_match: 0 or 100; None without references.
    """

    index: int
    seed: int
    request: str
    response: str
    references: tuple[str, ...]
    num_tokens: int
    ended: bool
    rouge_l: float | None
    exact_match: float | None


def summarise(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """Mean over seeds with standard deviation over seeds and bootstrap interval over examples."""
    seeds = sorted({p.seed for p in predictions})
    scores = {}
    for name in SCORED:
        values = {(p.seed, p.index): getattr(p, name) for p in predictions}
        if any(value is None for value in values.values()):
            continue
        percent = 100.0 if name == "ended" else 1.0
        by_seed = [
            mean_and_deviation([percent * v for (s, _), v in values.items() if s == seed])[0]
            for seed in seeds
        ]
        indices = sorted({p.index for p in predictions})
        by_example = [
            sum(percent * values[seed, index] for seed in seeds) / len(seeds) for index in indices
        ]
        mean, deviation = mean_and_deviation(by_seed)
        low, high = bootstrap_interval(by_example)
        scores[name] = {
            "mean": mean,
            "deviation_over_seeds": deviation,
            "interval_95": [low, high],
            "by_seed": by_seed,
        }
    return scores


def save_evaluation(
    directory: Path, name: str, result: dict[str, Any], predictions: Sequence[Prediction]
) -> None:
    """Write ``NAME.json`` and ``NAME.predictions.jsonl``, the latter first."""
    write_json_lines(directory / f"{name}.predictions.jsonl", map(asdict, predictions))
    write_json(directory / f"{name}.json", result)


def rescore(directory: str | Path) -> dict[str, dict[str, Any]]:
    """Compute the scores of kept predictions anew, without generating; what needs models stays.

    Args:
        directory: a run's, or one that ``evaluate`` wrote to.

    Returns:
        What each ``NAME.json`` holds now, by NAME.

    Raises:
        UserError: if there are no predictions.
    """
    place = Path(directory)
    if (place / "evaluation").is_dir():
        place = place / "evaluation"
    kept = sorted(place.glob("*.predictions.jsonl"))
    if not kept:
        raise UserError(f"{directory} holds no predictions. Name a run that was evaluated.")
    results = {}
    for path in kept:
        name = path.name.removesuffix(".predictions.jsonl")
        rows, _ = read_json_lines(path)
        predictions = [_scored_again(row) for row in rows]
        result = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        result["scores"] |= summarise(predictions)
        save_evaluation(place, name, result, predictions)
        results[name] = result
    return results


def _scored_again(row: dict[str, Any]) -> Prediction:
    references = tuple(row["references"])
    if references:
        row["rouge_l"] = rouge_l(row["response"], references)
        row["exact_match"] = exact_match(row["response"], references)
    return Prediction(**{**row, "references": references})
