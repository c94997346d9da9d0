"""What an evaluation found: predictions, scores, and the two files that keep them. No torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.metrics import exact_match, rouge_l, rouge_reads
from promptkd.evaluation.statistics import bootstrap_interval, mean_and_deviation
from promptkd.files import read_json, read_json_lines, write_json, write_json_lines

SCORED = ("rouge_l", "exact_match", "response_length", "ended")
"""What is known of every single response; the first two only where there are references."""


@dataclass(frozen=True)
class Prediction:
    """One response to one request.

    Attributes:
        index: the request's row in its data, from 0.
        seed: of the decoding.
        num_tokens: of the response, its stop token included.
        ended: whether the model stopped by itself within the limit.
        rouge_l: in percent; None without references that ROUGE can read.
        exact_match: 0 or 100; None without references.
    """

    index: int
    seed: int
    request: str
    response: str
    references: tuple[str, ...]
    num_tokens: int
    ended: bool
    rouge_l: float | None = None
    exact_match: float | None = None

    def score(self, name: str) -> float | None:
        """One of ``SCORED``; shares in percent."""
        if name == "response_length":
            return float(self.num_tokens)
        if name == "ended":
            return 100.0 * self.ended
        return getattr(self, name)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Prediction":
        """From a line of NAME.predictions.jsonl.

        Raises:
            TypeError, KeyError: if it is none.
        """
        return cls(**{**row, "references": tuple(row["references"])})


@dataclass(frozen=True)
class Score:
    """A mean and how sure it is.

    Attributes:
        num_requests: over how many requests; fewer than were asked where references are missing.
        interval_95: bootstrap over requests.
        by_seed: the means of the decoding seeds, or of the training seeds in a study.
        deviation_over_seeds: their sample standard deviation.
    """

    mean: float
    num_requests: int | None = None
    interval_95: tuple[float, float] | None = None
    by_seed: tuple[float, ...] = ()
    deviation_over_seeds: float | None = None

    @classmethod
    def of_dict(cls, found: Mapping[str, Any]) -> "Score":
        known = {key: found[key] for key in cls.__dataclass_fields__ if found.get(key) is not None}
        for key in ("interval_95", "by_seed"):
            if key in known:
                known[key] = tuple(known[key])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        found = {key: _plain(value) for key, value in asdict(self).items()}
        return {key: value for key, value in found.items() if value not in (None, [])}


@dataclass(frozen=True)
class Evaluation:
    """One model's responses to one data set, scored: NAME.json and NAME.predictions.jsonl.

    Attributes:
        name: the data set's.
        teacher: with which KL(student || teacher) was measured.
        decoding: how the responses were generated.
        seeds: of the decoding.
        dtype: what matrices were multiplied in.
    """

    name: str
    model: str
    data: tuple[str, ...]
    num_examples: int
    template: str
    max_request_tokens: int
    decoding: dict[str, Any]
    seeds: tuple[int, ...]
    dtype: str = ""
    teacher: str | None = None
    num_cut_requests: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    predictions: tuple[Prediction, ...] = ()

    def mean(self, score: str) -> float | None:
        return self.scores[score].mean if score in self.scores else None

    def by_example(self, score: str) -> dict[int, float]:
        """Mean over seeds of one score, by the index of the requests that have it."""
        collected: dict[int, list[float]] = {}
        for prediction in self.predictions:
            value = prediction.score(score)
            if value is not None:
                collected.setdefault(prediction.index, []).append(value)
        return {i: sum(values) / len(values) for i, values in sorted(collected.items())}

    @property
    def protocol(self) -> str:
        """Equal exactly for evaluations whose scores may be compared: same rows, same decoding."""
        rows = sorted(
            {(p.index, json.dumps(list(p.references) or p.request)) for p in self.predictions}
        )
        text = json.dumps([rows or self.name, self.settings()], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()

    def settings(self) -> dict[str, Any]:
        """What two evaluations must share to be compared, beside the requests."""
        names = ("decoding", "seeds", "num_examples", "template", "max_request_tokens")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """What NAME.json holds."""
        names = [name for name in self.__dataclass_fields__ if name not in KEPT_ELSEWHERE]
        record = {name: _plain(getattr(self, name)) for name in names}
        return record | {"scores": {name: score.to_dict() for name, score in self.scores.items()}}

    @classmethod
    def of_record(
        cls, name: str, record: Mapping[str, Any], predictions: Iterable[Prediction] = ()
    ) -> "Evaluation":
        """From what NAME.json holds; unknown keys are somebody else's."""
        known = {k: v for k, v in record.items() if k in cls.__dataclass_fields__}
        known |= {key: tuple(known[key]) for key in ("data", "seeds")}
        scores = {key: Score.of_dict(found) for key, found in record["scores"].items()}
        return cls(**{**known, "name": name, "scores": scores, "predictions": tuple(predictions)})


KEPT_ELSEWHERE = ("name", "predictions")
"""The file's name, and NAME.predictions.jsonl."""


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def summarise(predictions: Sequence[Prediction]) -> dict[str, Score]:
    """Means over seeds with deviations over seeds and intervals over requests.

    Where only some requests have references, the scores that need them are theirs alone.
    """
    seeds = sorted({prediction.seed for prediction in predictions})
    scores = {}
    for name in SCORED:
        values = {(p.seed, p.index): p.score(name) for p in predictions}
        values = {key: value for key, value in values.items() if value is not None}
        if not values:
            continue
        by_seed = [
            mean_and_deviation([v for (s, _), v in values.items() if s == seed])[0]
            for seed in seeds
        ]
        indices = sorted({index for _, index in values})
        by_example = [sum(values[s, i] for s in seeds) / len(seeds) for i in indices]
        mean, deviation = mean_and_deviation(by_seed)
        scores[name] = Score(
            mean=mean,
            num_requests=len(indices),
            interval_95=bootstrap_interval(by_example),
            by_seed=tuple(by_seed),
            deviation_over_seeds=deviation,
        )
    return scores


def save_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Write ``NAME.json`` and ``NAME.predictions.jsonl``, the latter first.

    Raises:
        UserError: if that would replace an evaluation of more responses, or there is no space.
    """
    place = directory / f"{evaluation.name}.json"
    kept = read_evaluation(place) if place.is_file() else None
    if kept and len(kept.predictions) > len(evaluation.predictions):
        raise UserError(
            f"{place} holds {len(kept.predictions)} responses, and this evaluation has only "
            f"{len(evaluation.predictions)}: it would replace a larger one. Give another --output, "
            "or remove that file."
        )
    rows = map(asdict, evaluation.predictions)
    write_json_lines(directory / f"{evaluation.name}.predictions.jsonl", rows)
    write_json(place, evaluation.to_dict())


def read_evaluation(path: Path, notes: list[str] | None = None) -> Evaluation | None:
    """NAME.json with its predictions; None, with a note, if it is damaged or something else."""
    notes = [] if notes is None else notes
    record = read_json(path, notes)
    if record is None or not isinstance(record.get("scores"), dict) or "decoding" not in record:
        return None
    lines = path.with_name(f"{path.stem}.predictions.jsonl")
    predictions, damaged = read_predictions(lines) if lines.exists() else ([], [])
    if damaged:
        shown = ", ".join(map(str, damaged[:3]))
        notes.append(f"{lines}: {len(damaged)} damaged lines are left out (line {shown}).")
    try:
        return Evaluation.of_record(path.stem, record, predictions)
    except (TypeError, KeyError):
        notes.append(f"{path} is an evaluation of another version, and is not shown.")
        return None


def read_predictions(path: Path) -> tuple[list[Prediction], list[int]]:
    """The predictions of a file, and the numbers (from 1) of lines that hold none."""
    rows, damaged = read_json_lines(path)
    predictions = []
    for number, row in rows.items():
        try:
            predictions.append(Prediction.of_row(row))
        except (TypeError, KeyError):
            damaged.append(number)
    return predictions, sorted(damaged)


def read_evaluations(directory: Path, notes: list[str] | None = None) -> list[Evaluation]:
    """Every evaluation below a directory, in the order of their paths."""
    found = (read_evaluation(path, notes) for path in sorted(directory.rglob("*.json")))
    return [evaluation for evaluation in found if evaluation is not None]


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
    results = {}
    for found in read_evaluations(place):
        if not found.predictions:
            continue
        predictions = tuple(_scored(p) for p in found.predictions)
        record = found.to_dict() | {"scores": {}}
        again = Evaluation.of_record(found.name, record, predictions)
        again.scores.update(found.scores | summarise(predictions))
        save_evaluation(place, again)
        results[found.name] = again.to_dict()
    if not results:
        raise UserError(f"{directory} holds no predictions. Name a run that was evaluated.")
    return results


def _scored(prediction: Prediction) -> Prediction:
    if not prediction.references:
        return prediction
    row = asdict(prediction)
    known = prediction.references
    row["rouge_l"] = rouge_l(prediction.response, known) if any(map(rouge_reads, known)) else None
    row["exact_match"] = exact_match(prediction.response, prediction.references)
    return Prediction.of_row(row)
