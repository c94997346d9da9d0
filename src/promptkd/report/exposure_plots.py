"""The figures of exposure bias: what each one plots, and the sentence below it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from promptkd.numbers import digits
from promptkd.report.data import Row, Run
from promptkd.report.figures import Curves, Figure, Series, lines
from promptkd.report.plots import change

EXCESS = "percent above the error on the teacher's text"


def exposure_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """The excess in both versions, its gaps by token, and how many responses still run."""
    made = _exposure_in_training(runs, directory)
    measured = [(slot, run) for slot, run in enumerate(runs) if run.exposure_bias]
    methods: dict[str, list[Run]] = {}
    for _, run in measured:
        methods.setdefault(run.method_of_study or run.label, []).append(run)
    bands = "bands: all training seeds" if len(methods) < len(measured) else "bands: 95%"
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
        series = [
            _mean(label, slot, own)
            for slot, (label, found) in enumerate(methods.items())
            if (own := [s for run in found if (s := _excess(run, slot, pick))])
        ]
        if series:
            said = "; ".join(f"{s.label} ends at {s.y[-1]:+.0f}%" for s in series)
            figure = lines(
                directory,
                name,
                title,
                f"{said.replace('-', '−')}. {note} Zero is no exposure bias; {bands}.",
                series,
                style=Curves(unit=EXCESS, x_label="response token", zero_line=True),
            )
            made.append(figure)
    if len(methods) == len(measured):  # not of every training seed
        for slot, run in measured:
            made += _gaps(run, slot, directory, several=len(measured) > 1)
    return made


def _mean(label: str, slot: int, series: Sequence[Series]) -> Series:
    """Of a method's training seeds, whose band they span; a single one has its own."""
    if len(series) < 2:
        return replace(series[0], label=label)
    at = [dict(zip(own.x, own.y, strict=True)) for own in series]
    x = [step for step in series[0].x if all(step in own for own in at)]
    values = [[own[step] for own in at] for step in x]
    low, high = [min(own) for own in values], [max(own) for own in values]
    return Series(label, x, [fmean(own) for own in values], slot=slot, low=low, high=high)


def _exposure_in_training(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """The paper's Figure 3(b): the excess of whole responses while the student learns."""
    series = []
    for slot, run in enumerate(runs):
        points = [(row["step"], row["exposure_bias"]["excess"][-1]) for row in run.exposures]
        known = [(step, excess) for step, excess in points if excess is not None]
        if known:
            x, y = zip(*known, strict=True)
            series.append(Series(label=run.label, x=x, y=y, slot=slot))
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


def _excess(run: Run, slot: int, pick: Callable[[Any], Any]) -> Series | None:
    curve = pick(run.exposure_bias)
    if not curve:
        return None
    bands = (curve.get("intervals") or {}).get("excess") or {}
    none = [None] * len(curve["steps"])
    rows = [
        row
        for row in zip(
            curve["steps"],
            curve["excess"],
            bands.get("low", none),
            bands.get("high", none),
            strict=True,
        )
        if row[1] is not None
    ]
    if not rows:
        return None
    x, y, low, high = (list(column) for column in zip(*rows, strict=True))
    banded = None not in low and None not in high
    return Series(
        label=run.label,
        x=x,
        y=y,
        slot=slot,
        low=low if banded else None,
        high=high if banded else None,
    )


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
