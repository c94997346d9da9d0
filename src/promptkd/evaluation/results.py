"""Predictions and scores as types, and the two files of an evaluation that keep them. No torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from promptkd.errors import UserError
from promptkd.evaluation.metrics import (
    METRICS,
    TEACHER_CROSS_ENTROPY,
    distinct_n,
    metrics_of,
    of_all_responses,
    pass_at_k,
    score_text,
)
from promptkd.evaluation.statistics import bootstrap_interval, mean_and_deviation
from promptkd.files import read_json, read_json_lines

MEASURED = ("response_length", "ended")
"""What is known of every response, whatever it is scored by."""
TOKEN_MEANS = ("reverse_kl_to_teacher", "reverse_kl_without_context", TEACHER_CROSS_ENTROPY)
"""Nats per token: means over response tokens, so long responses count for more."""


@dataclass(frozen=True)
class Prediction:
    """One response to one request.

    Attributes:
        index: the request's row in its data, from 0.
        seed: of the decoding.
        num_tokens: of the response, its stop token included.
        ended: whether the model stopped by itself within the limit.
        teacher_request: what the teacher reads, where it isn't what the student does.
        scores: by metric, in percent where they are shares; those that need references only where
            there are some.
    """

    index: int
    seed: int
    request: str
    response: str
    references: tuple[str, ...]
    num_tokens: int
    ended: bool
    teacher_request: str | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def score(self, name: str) -> float | None:
        """One of its scores or of ``MEASURED``; shares in percent."""
        if name == "response_length":
            return float(self.num_tokens)
        if name == "ended":
            return 100.0 * self.ended
        return self.scores.get(name)

    def scored_by(self, metrics: Sequence[str]) -> "Prediction":
        """The same response with the scores of ``metrics`` computed anew; others are kept."""
        found = score_text(metrics, self.response, self.references, self._fields())
        kept = {name: value for name, value in self.scores.items() if name not in metrics}
        return replace(self, scores=found | kept)

    def to_row(self) -> dict[str, Any]:
        """A line of NAME.predictions.jsonl: the scores stand beside the other fields."""
        own = self._fields()
        if self.teacher_request is None:
            del own["teacher_request"]
        return {**own, **self.scores}

    def _fields(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "scores"}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Prediction":
        """From a line of NAME.predictions.jsonl.

        Raises:
            TypeError, KeyError, ValueError: if it is none.
        """
        if "request" not in row and "references" not in row:  # kept without: study.stored
            row = {**row, "request": "", "references": ()}
        names = cls.__dataclass_fields__
        own = {name: value for name, value in row.items() if name in names}
        scores = {k: float(v) for k, v in row.items() if k not in names and v is not None}
        return cls(**{**own, "references": tuple(row["references"]), "scores": scores})


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
        size_and_speed: what the model weighs and how fast it generates; see that module.
        rows: digest of the requests' rows and references, where those are kept elsewhere.
        date: as of which requests were rendered, for templates that say it.
        asked: digest of everything that decides responses and scores; "" where that isn't known.
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
    rows: str = ""
    date: str = ""
    asked: str = ""
    teacher: str | None = None
    num_cut_requests: int = 0
    size_and_speed: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    predictions: tuple[Prediction, ...] = ()

    @property
    def num_lost(self) -> int:
        """Responses that aren't there: of one per request and seed."""
        return self.num_examples * len(self.seeds) - len(self.predictions)

    def mean(self, score: str) -> float | None:
        return self.scores[score].mean if score in self.scores else None

    def by_example(self, score: str) -> dict[int, float]:
        """Mean over seeds of one score, by the index of the requests that have it."""
        found = totals(self.predictions, score)
        return {index: total / size for index, (total, size) in found.items()}

    def also_scored_by(self, metrics: Sequence[str]) -> "Evaluation":
        """With the metrics of single responses that it lacks, computed from the predictions."""
        missing = [name for name in metrics if name not in self.scores]
        if not missing:
            return self
        predictions = tuple(p.scored_by(missing) for p in self.predictions)
        defined = {name for p in predictions for name in p.scores if name in missing}
        added = {name: _over_seeds(predictions, name) for name in sorted(defined)}
        return replace(self, predictions=predictions, scores=self.scores | added)

    def scored_anew(self) -> "Evaluation":
        """Scores of responses computed again; those of models and users' functions stay."""
        metrics = metrics_of([p.references for p in self.predictions], [*self.scores])
        own = [name for name in metrics if name in METRICS]
        predictions = tuple(p.scored_by(own) for p in self.predictions)
        kept = {name: score for name, score in self.scores.items() if name not in METRICS}
        scores = kept | summarise(predictions, [*self.scores])
        return replace(self, scores=scores, predictions=predictions)

    def with_references(self, references: Mapping[int, tuple[str, ...]]) -> "Evaluation":
        """With the references that ``study.stored`` left out put back, by row.

        Raises:
            UserError: if they aren't those that were scored.
        """
        known = [p for p in self.predictions if references.get(p.index)]
        predictions = tuple(replace(p, references=references[p.index]) for p in known)
        if len(known) < len(self.predictions) or rows_digest(predictions) != self.rows:
            raise UserError(
                f"{', '.join(self.data)} doesn't hold the references that '{self.name}' was scored "
                "by: others, or too few. Name the data as it was then."
            )
        return replace(self, predictions=predictions)

    @property
    def protocol(self) -> str:
        """Equal exactly for evaluations whose scores may be compared: same rows, same decoding."""
        rows = self.rows or (rows_digest(self.predictions) if self.predictions else self.name)
        return _digest([rows, self.settings()])

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


def rows_digest(predictions: Iterable[Prediction]) -> str:
    """Of the rows that were asked: the references, or the request where there are none."""
    return _digest(
        sorted({(p.index, json.dumps(list(p.references) or p.request)) for p in predictions})
    )


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def summarise(predictions: Sequence[Prediction], asked: Sequence[str] = ()) -> dict[str, Score]:
    """Means over seeds with deviations over seeds and intervals over requests.

    Where only some requests have a score, because they alone have references, it is theirs alone.

    Args:
        asked: names of metrics that describe several responses: ``distinct_2``, ``exact_match@5``.
    """
    names = dict.fromkeys([*(n for p in predictions for n in p.scores), *MEASURED])
    scores = {name: _over_seeds(predictions, name) for name in names}
    for name in asked:
        found = of_all_responses(name)
        if found and found[0] == "distinct":
            scores[name] = _distinct(predictions, found[1])
        elif found and found[0] in scores:
            scores[name] = _pass(predictions, *found)
    return scores


def _over_seeds(predictions: Sequence[Prediction], name: str) -> Score:
    seeds = sorted({p.seed for p in predictions if p.score(name) is not None})
    of_seed = ([p for p in predictions if p.seed == seed] for seed in seeds)
    by_seed = [_mean(totals(own, name).values()) for own in of_seed]
    by_example = totals(predictions, name).values()
    mean, deviation = mean_and_deviation(by_seed)
    return Score(
        mean=mean,
        num_requests=len(by_example),
        interval_95=bootstrap_interval(*zip(*by_example, strict=True)),
        by_seed=tuple(by_seed),
        deviation_over_seeds=deviation,
    )


def totals(predictions: Iterable[Prediction], name: str) -> dict[int, tuple[float, float]]:
    """By the index of the requests that have a score: its sum over the seeds, and over how many.

    What is a mean over tokens is summed over tokens.
    """
    found: dict[int, tuple[float, float]] = {}
    for prediction in predictions:
        value = prediction.score(name)
        if value is not None:
            weight = prediction.num_tokens if name in TOKEN_MEANS else 1
            total, size = found.get(prediction.index, (0.0, 0.0))
            found[prediction.index] = total + weight * value, size + weight
    return dict(sorted(found.items()))


def _mean(of_requests: Iterable[tuple[float, float]]) -> float:
    sums, sizes = zip(*of_requests, strict=True)
    return sum(sums) / sum(sizes)


def _distinct(predictions: Sequence[Prediction], n: int) -> Score:
    """Per seed, over all of its responses: no mean over requests, so without an interval."""
    seeds = sorted({prediction.seed for prediction in predictions})
    by_seed = [distinct_n([p.response for p in predictions if p.seed == s], n) for s in seeds]
    mean, deviation = mean_and_deviation(by_seed)
    return Score(mean=mean, by_seed=tuple(by_seed), deviation_over_seeds=deviation)


def _pass(predictions: Sequence[Prediction], metric: str, k: int) -> Score:
    """A response is right if the metric gives it 100."""
    right: dict[int, list[bool]] = {}
    for prediction in predictions:
        if metric in prediction.scores:
            right.setdefault(prediction.index, []).append(prediction.scores[metric] == 100)
    values = [pass_at_k(len(own), sum(own), k) for own in right.values() if len(own) >= k]
    return Score(
        mean=fmean(values), num_requests=len(values), interval_95=bootstrap_interval(values)
    )


def read_evaluation(path: Path, notes: list[str] | None = None) -> Evaluation | None:
    """NAME.json with its predictions; None, with a note, if it is damaged or something else."""
    notes = [] if notes is None else notes
    record = read_json(path, notes)
    if record is None or not isinstance(record.get("scores"), dict) or "decoding" not in record:
        return None
    lines = path.with_name(f"{path.stem}.predictions.jsonl")
    lines = lines if lines.exists() else path.with_name(f"{lines.name}.gz")
    predictions, damaged = read_predictions(lines) if lines.exists() else ([], [])
    if damaged:
        shown = ", ".join(map(str, damaged[:3]))
        notes.append(f"{lines}: {len(damaged)} damaged lines are left out (line {shown}).")
    try:
        found = Evaluation.of_record(path.stem, record, predictions)
    except (TypeError, KeyError):
        notes.append(f"{path} is an evaluation of another version, and is not shown.")
        return None
    if lines.exists() and found.num_lost:
        notes.append(f"{lines} lacks {found.num_lost} of the responses that were scored.")
    return found


def refuse_partial(directory: Path, evaluation: Evaluation) -> Evaluation:
    """An evaluation whose responses are to be computed with, if none is missing.

    Raises:
        UserError: if its predictions are damaged: what is left would give another number.
    """
    if not evaluation.num_lost:
        return evaluation
    raise UserError(
        f"{directory / evaluation.name}.predictions.jsonl lacks {evaluation.num_lost} of the "
        "responses that were scored: it is missing or damaged. Put a copy of it back, or remove it "
        f"with {evaluation.name}.json and evaluate again."
    )


def read_predictions(path: Path) -> tuple[list[Prediction], list[int]]:
    """The predictions of a file, and the numbers (from 1) of lines that hold none."""
    rows, damaged = read_json_lines(path)
    predictions = []
    for number, row in rows.items():
        try:
            predictions.append(Prediction.of_row(row))
        except (TypeError, KeyError, ValueError):
            damaged.append(number)
    return predictions, sorted(damaged)


def read_evaluations(directory: Path, notes: list[str] | None = None) -> list[Evaluation]:
    """Every evaluation below a directory, in the order of their paths."""
    return [own for p in sorted(directory.rglob("*.json")) if (own := read_evaluation(p, notes))]


def own_evaluations(directory: Path, notes: list[str] | None = None) -> list[Evaluation]:
    """Those in a directory itself: other models' are in folders of it."""
    return [own for p in sorted(directory.glob("*.json")) if (own := read_evaluation(p, notes))]
