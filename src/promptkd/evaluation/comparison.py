"""Paired differences between two evaluations, with bootstrap intervals. No torch."""

from dataclasses import dataclass
from pathlib import Path

from promptkd.errors import UserError
from promptkd.evaluation.results import (
    MEASURED,
    Evaluation,
    own_evaluations,
    refuse_partial,
    totals,
)
from promptkd.evaluation.statistics import paired_difference
from promptkd.run import Place, lacks_of_run, runs_in


@dataclass(frozen=True)
class Difference:
    """first - second in one score, over the requests for which both have it.

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

    @property
    def shown(self) -> bool:
        """Whether the data show a difference: the interval excludes zero."""
        return self.low > 0 or self.high < 0


class Differences(list[Difference]):
    """What ``compare`` returns, printed as a table."""

    def __repr__(self) -> str:
        return "\n".join(
            f"{row.data:20} {row.score:12} {row.first:8.3f} - {row.second:8.3f} = "
            f"{row.difference:+.3f}, 95% [{row.low:+.3f}, {row.high:+.3f}] "
            f"({'clear' if row.shown else 'not clear'}, {row.num_requests} requests)"
            for row in self
        )


def difference(own: Evaluation, other: Evaluation, score: str) -> Difference | None:
    """Requests are resampled in pairs, each with its responses of all seeds.

    None if one lacks the score, or if they were asked different requests.
    """
    ours, theirs = totals(own.predictions, score), totals(other.predictions, score)
    if not ours or ours.keys() != theirs.keys():
        return None
    first, second = list(ours.values()), list(theirs.values())
    gap, low, high = paired_difference(first, second)
    return Difference(
        data=own.name,
        score=score,
        first=sum(v for v, _ in first) / sum(n for _, n in first),
        second=sum(v for v, _ in second) / sum(n for _, n in second),
        difference=gap,
        low=low,
        high=high,
        num_requests=len(first),
    )


def differences(own: Evaluation, other: Evaluation) -> list[Difference]:
    """Every score that both have of every response."""
    names = dict.fromkeys([*own.scores, *MEASURED])
    found = (difference(own, other, name) for name in names)
    return [row for row in found if row is not None]


def compare(first: Place, second: Place) -> Differences:
    """Every score that two evaluations share, on every data set that both were asked.

    Args:
        first: a run's directory, or the output of ``evaluate``.
        second: likewise.

    Raises:
        UserError: if one has no evaluation, or a damaged one, or no data set was asked in the same
            way of both.
    """
    own, other = (_evaluations(Path(place)) for place in (first, second))
    rows = Differences()
    for name in sorted(own.keys() & other.keys()):
        if own[name].protocol == other[name].protocol:
            rows += differences(own[name], other[name])
    if rows:
        return rows
    raise UserError(f"Nothing to compare: {_why_not(own, other)} Evaluate both alike.")


def _why_not(own: dict[str, Evaluation], other: dict[str, Evaluation]) -> str:
    common = sorted(own.keys() & other.keys())
    if not common:
        return (
            f"the first was evaluated on {', '.join(own)}, the second on {', '.join(other)}, and "
            "no data set is among both."
        )
    reasons = []
    for name in common:
        ours, theirs = own[name].settings(), other[name].settings()
        unlike = [f"{k} {ours[k]!r} and {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
        reasons.append(f"{name}: {'; '.join(unlike) or 'other requests under the same name'}.")
    return " ".join(reasons)


def _evaluations(place: Path) -> dict[str, Evaluation]:
    if not place.is_dir():
        raise UserError(f"{place} is no directory. Name a run, or what evaluate wrote to.")
    directory = place / "evaluation" if (place / "evaluation").is_dir() else place
    notes: list[str] = []
    made = [refuse_partial(directory, own) for own in own_evaluations(directory, notes)]
    found = {evaluation.name: evaluation for evaluation in made}
    if not found and notes:
        raise UserError(f"{notes[0]} Evaluate again.")
    if not found:
        is_run = (place / "recipe.yaml").is_file()
        if not is_run and runs_in(place):
            raise UserError(f"{place} holds no evaluation: {lacks_of_run(place)}.")
        missing = f"{place} --data FILE" if is_run else f"MODEL --data FILE --output {place}"
        raise UserError(f"{place} holds no evaluation. Run: promptkd evaluate {missing}")
    return found
