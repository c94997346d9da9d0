"""The figures of exposure bias: what each one plots, and the sentence below it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from promptkd.numbers import digits
from promptkd.report.data import Row, Run
from promptkd.report.figures import Curves, Figure, Series, lines
from promptkd.report.plots import change, runs_of_methods, series_of

EXCESS = "percent above the error on the teacher's text"


def exposure_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """The excess in both versions, its gaps by token, and how many responses still run."""
    made = _exposure_in_training(runs, directory)
    measured = [(slot, run) for slot, run in enumerate(runs) if run.exposure_bias]
    of_methods = len(runs_of_methods(runs)) < len(runs)
    bands = "all training seeds" if of_methods else "95%"
    for name, title, pick, note in (
        (
            "exposure-bias-per-token",
            "Excess error, running responses",
            lambda bias: bias.get("per_token"),
            "Mean over responses still running at each token, so lengths don't matter.",
        ),
        (
            "exposure-bias-paper",
            "Excess error, as in the paper",
            lambda bias: bias,
            "A response that has ended counts as no error, so short responses look better.",
        ),
    ):
        series = _excess(runs, pick)
        if series:
            said = "; ".join(f"{s.label} ends at {s.y[-1]:+.0f}%" for s in series)
            figure = lines(
                directory,
                name,
                title,
                f"{said.replace('-', '−')}. {note} Zero is no exposure bias; bands: {bands}.",
                series,
                style=Curves(unit=EXCESS, x_label="response token", zero_line=True),
            )
            made.append(figure)
    if not of_methods:
        for slot, run in measured:
            made += _gaps(run, slot, directory, several=len(measured) > 1)
    return made


def _exposure_in_training(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """The paper's Figure 3(b): the excess of whole responses while the student learns."""
    series = series_of(
        runs,
        lambda run: [
            (row["step"], excess)
            for row in run.exposures
            if (excess := row["exposure_bias"]["excess"][-1]) is not None
        ],
    )
    if not series:
        return []
    figure = lines(
        directory,
        "exposure-bias-in-training",
        "Excess error in training",
        f"{change(series)} Over whole responses to the validation requests, as in the paper's "
        "Figure 3(b). Zero is no exposure bias.",
        series,
        style=Curves(unit=EXCESS, zero_line=True),
    )
    return [figure]


def _excess(runs: Sequence[Run], pick: Callable[[Row], Row | None]) -> list[Series]:
    """The excess by length; a run that stands alone has a band over requests."""

    def points(run: Run) -> list[tuple[float, float]]:
        curve = pick(run.exposure_bias or {}) or {}
        known = zip(curve.get("steps", ()), curve.get("excess", ()), strict=True)
        return [(step, excess) for step, excess in known if excess is not None]

    alone = {label: own[0] for label, own in runs_of_methods(runs).items() if len(own) == 1}
    return [
        _with_band(one, pick(alone[one.label].exposure_bias or {}) or {})
        if one.label in alone
        else one
        for one in series_of(runs, points)
    ]


def _with_band(one: Series, curve: Row) -> Series:
    bands = (curve.get("intervals") or {}).get("excess")
    if not bands:
        return one
    ends = dict(zip(curve["steps"], zip(bands["low"], bands["high"], strict=True), strict=True))
    low, high = zip(*(ends[step] for step in one.x), strict=True)
    return one if None in (*low, *high) else replace(one, low=low, high=high)


def _gaps(run: Run, slot: int, directory: Path, several: bool) -> list[Figure]:
    """KL by position after either model's text, and the share of responses still running."""
    bias = run.exposure_bias or {}
    whose = f" ({run.label})" if several else ""
    made = []
    curve, survival = bias.get("per_token"), bias.get("survival")
    if curve and curve["steps"]:
        made.append(_kl_by_position(curve, f"kl-by-position-{slot + 1}", whose, directory))
    if survival:
        series = [
            Series(
                label=model,
                x=range(1, len(shares) + 1),
                y=[100 * share for share in shares],
                slot=number,
            )
            for number, (model, shares) in enumerate(survival.items())
        ]
        lengths = bias.get("mean_length") or {}
        said = "; ".join(f"{model} {length:.0f} tokens" for model, length in lengths.items())
        figure = lines(
            directory,
            f"survival-{slot + 1}",
            f"Responses still running{whose}",
            f"Mean length: {said}." if said else "Whose responses are longer.",
            series,
            style=Curves(unit="percent", x_label="response token", from_zero=True),
        )
        made.append(figure)
    return made


def _kl_by_position(curve: Row, name: str, whose: str, directory: Path) -> Figure:
    series = [
        Series(
            label=f"{model}'s text",
            x=curve["steps"],
            y=_increments(curve[f"{model}_gap"]),
            slot=number,
        )
        for number, model in enumerate(("student", "teacher"))
    ]
    tail = "; ".join(
        f"after the {s.label}: {digits(sum(s.y) / len(s.y))} nats on average" for s in series
    )
    return lines(
        directory,
        name,
        f"KL by position{whose}",
        f"{tail.capitalize()}. KL(teacher ‖ student) over the responses still running.",
        series,
        style=Curves(
            unit="nats at this token", x_label="response token", smooth=True, from_zero=True
        ),
    )


def _increments(sums: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
