"""Two evaluations side by side: is the difference more than chance? No torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from promptkd.errors import UserError
from promptkd.evaluation.metrics import SCORED
from promptkd.report.data import Evaluation, Model, read_evaluations
from promptkd.report.findings import compare as compare_models


@dataclass(frozen=True)
class Difference:
    """first - second in one score, over the same requests.

    Attributes:
        data: the data set's name.
        low: end of the 95 % paired bootstrap interval over requests, as ``high`` is.
    """

    data: str
    score: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    num_requests: int


def compare(first: str | Path, second: str | Path) -> list[Difference]:
    """Every score that two evaluations share, on every data set that both were asked.

    Each request's score is its mean over the seeds; requests are resampled in pairs.

    Args:
        first: a run's directory, or one that ``evaluate`` wrote to.
        second: likewise.

    Raises:
        UserError: if one has no evaluation, or no data set was asked in the same way of both.
    """
    own, other = (_evaluations(Path(place)) for place in (first, second))
    rows = []
    for name in sorted(own.keys() & other.keys()):
        if own[name].protocol == other[name].protocol:
            rows += differences(own[name], other[name])
    if rows:
        return rows
    settings = ("data", "num_examples", "seeds", "template", "max_request_tokens", "decoding")
    asked = "; ".join(
        f"{place}: " + json.dumps({n: {k: e.record.get(k) for k in settings} for n, e in d.items()})
        for place, d in ((first, own), (second, other))
    )
    raise UserError(
        "Nothing to compare: no data set was evaluated on the same requests with the same seeds "
        f"and decoding. Evaluate both alike. {asked}"
    )


def _evaluations(place: Path) -> dict[str, Evaluation]:
    directory = place / "evaluation" if (place / "evaluation").is_dir() else place
    found = {evaluation.name: evaluation for evaluation in read_evaluations(directory)}
    if not found:
        raise UserError(f"{place} holds no evaluation. Run: promptkd evaluate {place} --data FILE")
    return found


def differences(own: Evaluation, other: Evaluation) -> list[Difference]:
    """Every score that both have of every response; none if they were asked different requests."""
    rows = []
    for score in SCORED:
        found = compare_models(Model("first", "other", own), Model("second", "other", other), score)
        if found is None:
            continue
        first, second = (e.record["scores"][score]["mean"] for e in (own, other))
        unit = 100.0 if score == "ended" else 1.0  # percent, as in the scores
        rows.append(
            Difference(
                own.name,
                score,
                first,
                second,
                unit * found.difference,
                unit * found.low,
                unit * found.high,
                num_requests=len(own.by_example(score) or ()),
            )
        )
    return rows
