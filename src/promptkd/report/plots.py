"""The report's figures: what each one plots, and the sentence below it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from promptkd.report.comparisons import headline, score_name
from promptkd.report.cost import cost
from promptkd.report.data import DataSet, Model, Row, Run
from promptkd.report.figures import (
    Curves,
    Figure,
    Series,
    histograms,
    intervals,
    lines,
    stacked_bars,
)
from promptkd.report.numbers import digits

STEP_CURVES = (
    ("loss", "Training loss", "nats per token", "What the method minimises."),
    (
        "response_length",
        "Length of training responses",
        "tokens",
        "A collapse to short or endless responses shows here first.",
    ),
    (
        "share_ended",
        "Responses that ended by themselves",
        "percent of the step's responses",
        "The others were cut at the limit.",
    ),
)
VALIDATION_CURVES = (
    (
        "reverse_kl_to_teacher",
        "Student from teacher",
        "KL, nats per token, validation",
        "Towards the plain teacher, on the student's own responses.",
    ),
    ("rouge_l", "ROUGE-L in training", "percent, validation", "One response per request."),
    (
        "cross_entropy",
        "Loss on the references",
        "nats per token, validation",
        "It may rise while the student leaves the references for its teacher.",
    ),
)
PERCENT = {"share_ended": 100.0}
EXCESS = "percent above the error on the teacher's text"
PROMPT_CURVES = (
    (
        "kl_teacher_student",
        "Adapted teacher from student",
        "KL, nats per token",
        "What moves the prompt, on the responses of the step.",
    ),
    (
        "kl_teacher_plain",
        "Adapted teacher from itself",
        "KL, nats per token",
        "What the regulariser holds back, measured while it is on.",
    ),
)
OTHERS_SLOT = {"start": 5, "other": 4, "teacher": -1}


def training_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """Validation curves first, because they are what the run was for; then the steps'."""
    made = []
    for key, title, unit, note in VALIDATION_CURVES:
        series = _series(runs, partial(_validation_points, key=key), mark=True)
        if series:
            message = f"{_kept_change(series)} {note}"
            name = f"validation-{key.replace('_', '-')}"
            made.append(lines(directory, name, title, message, series, style=Curves(unit)))
    return made + _step_figures(runs, directory, STEP_CURVES)


def prompt_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """How the adapted teacher stands to the student, and to what it says without a prompt."""
    return _step_figures(runs, directory, PROMPT_CURVES)


def score_figures(runs: Sequence[Run], sets: Sequence[DataSet], directory: Path) -> list[Figure]:
    """The score that compares models, with intervals: one figure per data set."""
    made = []
    for number, data in enumerate(sets, start=1):
        rows, compared = [], headline(data) or ""
        for model in data.models:
            score = model.evaluation.scores.get(compared)
            if score and score.interval_95:
                rows.append((model.label, score.mean, *score.interval_95, _slot(runs, model)))
        if len(rows) > 1:
            said = "; ".join(f"{label} {mean:.1f}" for label, mean, *_ in rows)
            title = f"{score_name(compared)} on {data.name}"
            message = f"{said}. Bars: 95% intervals over requests, each model by itself."
            name = f"scores-{number}-{compared.replace('_', '-')}"
            made.append(intervals(directory, name, title, message, rows, unit="percent"))
    return made


def length_figures(runs: Sequence[Run], sets: Sequence[DataSet], directory: Path) -> list[Figure]:
    """How long the responses are, and how many were cut at the limit."""
    made = []
    for number, data in enumerate(sets, start=1):
        groups, said = [], []
        for model in data.models[:6]:
            predictions = model.evaluation.predictions
            if predictions:
                values = [float(p.num_tokens) for p in predictions]
                cut = 100 - sum(p.score("ended") or 0 for p in predictions) / len(predictions)
                groups.append((model.label, values, _slot(runs, model)))
                mean = sum(values) / len(values)
                said.append(f"{model.label}: {mean:.0f} tokens, {cut:.0f}% cut at the limit")
        if groups:
            figure = histograms(
                directory,
                f"lengths-{number}",
                f"Response length on {data.name}",
                "; ".join(said) + ".",
                groups,
                unit="percent of the responses",
                x_label="tokens",
            )
            made.append(figure)
    return made


def exposure_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """The excess in both versions, its gaps by token, and how many responses still run."""
    made = _exposure_in_training(runs, directory)
    measured = [(slot, run) for slot, run in enumerate(runs) if run.exposure_bias]
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
        series = [s for slot, run in measured if (s := _excess(run, slot, pick)) is not None]
        if series:
            said = "; ".join(f"{s.label} ends at {s.y[-1]:+.0f}%" for s in series)
            figure = lines(
                directory,
                name,
                title,
                f"{said.replace('-', '−')}. {note} Zero is no exposure bias; bands: 95%.",
                series,
                style=Curves(unit=EXCESS, x_label="response token", zero_line=True),
            )
            made.append(figure)
    for slot, run in measured:
        made += _gaps(run, slot, directory, several=len(measured) > 1)
    return made


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
        f"{_change(series)} Over whole responses to the validation requests, as in the paper's "
        "Figure 3(b). Zero is no exposure bias.",
        series,
        style=Curves(unit=EXCESS, zero_line=True),
    )
    return [figure]


def cost_figure(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """Seconds a step: generation, the teacher's passes, the student's, heads and losses."""
    known = [(run, c) for run in runs if (c := cost(run))]
    if not known:
        return []
    parts = {
        "generating responses": [c.seconds_writing / c.steps for _, c in known],
        "teacher": [c.seconds_teacher / c.steps for _, c in known],
        "student": [c.seconds_student / c.steps for _, c in known],
        "output layers and losses": [c.seconds_losses / c.steps for _, c in known],
        "the rest of learning": [c.seconds_rest / c.steps for _, c in known],
    }
    said = []
    for (run, _), *took in zip(known, *parts.values(), strict=True):
        share = 100 * took[0] / sum(took) if sum(took) else 0.0
        said.append(f"{run.label}: {digits(sum(took))} s a step, {share:.0f}% of it generation")
    return [
        stacked_bars(
            directory,
            "cost",
            "Where the time went",
            f"{'; '.join(said)}.",
            [run.label for run, _ in known],
            list(parts.items()),
            unit="seconds per step",
        )
    ]


def _step_figures(
    runs: Sequence[Run], directory: Path, curves: Sequence[tuple[str, str, str, str]]
) -> list[Figure]:
    made = []
    for key, title, unit, note in curves:
        series = _series(runs, partial(_step_points, key=key))
        if series:
            figure = lines(
                directory,
                f"training-{key.replace('_', '-')}",
                title,
                f"{_change(series)} {note}",
                series,
                style=Curves(
                    unit=unit,
                    smooth=True,
                    from_zero=key in ("response_length", "share_ended"),
                ),
            )
            made.append(figure)
    return made


def runs_of_methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """What one line or colour is: a method of a study with all its seeds, else a run."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.method_of_study or run.label, []).append(run)
    return found


def _slot(runs: Sequence[Run], model: Model) -> int:
    """Colour of a model: a run's place, a fixed one for the others, ink (-1) for the teacher."""
    if model.role == "run":
        return [*runs_of_methods(runs)].index(model.label) % 6
    return OTHERS_SLOT[model.role]


def _series(
    runs: Sequence[Run], points: Callable[[Run], list[tuple[float, float]]], mark: bool = False
) -> list[Series]:
    """One line per run that has points; ``mark`` marks the first one and the kept step's."""
    made = []
    for slot, run in enumerate(runs):
        found = points(run)
        if found:
            x, y = zip(*found, strict=True)
            kept = x.index(run.kept_step) if run.kept_step in x else len(x) - 1
            marked = tuple(dict.fromkeys((0, kept))) if mark else ()
            made.append(Series(label=run.label, x=x, y=y, slot=slot, marked=marked))
    return made


def _step_points(run: Run, key: str) -> list[tuple[float, float]]:
    factor = PERCENT.get(key, 1.0)
    return [(row["step"], factor * row[key]) for row in run.steps if row.get(key) is not None]


def _validation_points(run: Run, key: str) -> list[tuple[float, float]]:
    return [
        (row["step"], row["evaluation"][key])
        for row in run.validations
        if row["evaluation"].get(key) is not None
    ]


def _kept_change(series: Sequence[Series]) -> str:
    """``1.87 at step 0, 0.612 at step 836, the step that was kept``."""
    said = []
    for one in series:
        first, kept = one.marked[0], one.marked[-1]
        words = f"{digits(one.y[first])} at step {one.x[first]}"
        if kept != first:
            words += f", {digits(one.y[kept])} at step {one.x[kept]}"
        said.append(words if len(series) == 1 else f"{one.label}: {words}")
    ending = ", the step that was kept." if len(series) == 1 else "; the last is the kept step."
    return "; ".join(said) + (ending if any(len(one.marked) > 1 for one in series) else ".")


def _change(series: Sequence[Series]) -> str:
    """``From 1.2 to 0.8.``, over the first and last tenth where there are many points."""
    said = []
    for one in series:
        tenth = max(1, len(one.y) // 10)
        first, last = sum(one.y[:tenth]) / tenth, sum(one.y[-tenth:]) / tenth
        words = f"from {digits(first)} to {digits(last)}"
        said.append(words.capitalize() if len(series) == 1 else f"{one.label}: {words}")
    many = max(len(one.y) for one in series) >= 20
    return "; ".join(said) + (" (means of the first and last tenth)." if many else ".")


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
            label=f"after the {model}'s text",
            x=curve["steps"],
            y=_increments(curve[f"{model}_gap"]),
            slot=number,
        )
        for number, model in enumerate(("student", "teacher"))
    ]
    tail = "; ".join(f"{s.label}: {digits(sum(s.y) / len(s.y))} nats on average" for s in series)
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
