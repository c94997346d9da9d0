"""The report's figures: what each one plots, and the sentence below it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from promptkd.numbers import digits
from promptkd.report.comparisons import NATS, headline, number_of, score_name
from promptkd.report.cost import cost
from promptkd.report.data import DataSet, Model, Run
from promptkd.report.figures import (
    Curves,
    Figure,
    Series,
    intervals,
    lines,
    stacked_bars,
)

STEP_CURVES = (
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
    ("exact_match", "Exact match in training", "percent, validation", "One response per request."),
    ("rouge_l", "ROUGE-L in training", "percent, validation", "One response per request."),
    (
        "cross_entropy",
        "Loss on the references",
        "nats per token, validation",
        "It may rise while the student leaves the references for its teacher.",
    ),
)
PERCENT = {"share_ended": 100.0}
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
COST_PARTS = {
    "generation": "generating responses",
    "teacher": "teacher",
    "student": "student",
    "losses": "output layers and losses",
    "rest": "the rest of learning",
}
OTHERS_SLOT = {"start": 5, "other": 4, "teacher": -1}


def training_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """Validation curves first, because they are what the run was for; then the steps'."""
    made = []
    for key, title, unit, note in VALIDATION_CURVES:
        series = series_of(runs, partial(_validation_points, key=key), mark=True)
        if series:
            said = _kept_change(series) if series[0].marked else change(series)
            message = f"{said} {note}{_band(series)}"
            name = f"validation-{key.replace('_', '-')}"
            made.append(lines(directory, name, title, message, series, style=Curves(unit)))
    return made + _losses(runs, directory) + _step_figures(runs, directory, STEP_CURVES)


def prompt_figures(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """How the adapted teacher stands to the student, and to what it says without a prompt."""
    return _step_figures(runs, directory, PROMPT_CURVES)


def score_figures(runs: Sequence[Run], sets: Sequence[DataSet], directory: Path) -> list[Figure]:
    """The score that compares models, with intervals: one figure per data set."""
    made = []
    for place, data in enumerate(sets, start=1):
        rows, compared = [], headline(data) or ""
        unit = "nats per token" if compared in NATS else "percent"
        for model in data.models:
            score = model.evaluation.scores.get(compared)
            if score and score.interval_95:
                rows.append((model.label, score.mean, *score.interval_95, _slot(runs, model)))
        if len(rows) > 1:
            number = number_of(compared)
            said = "; ".join(f"{label} {number(mean)}" for label, mean, *_ in rows)
            title = f"{score_name(compared).partition(', ')[0]} on {data.name}"
            over = "requests and training seeds" if data.of_methods else "requests"
            message = f"{said}. Bars: 95% intervals over {over}, each model by itself."
            name = f"scores-{place}-{compared.replace('_', '-')}"
            made.append(intervals(directory, name, title, message, rows, unit=unit))
    return made


def length_figures(runs: Sequence[Run], sets: Sequence[DataSet], directory: Path) -> list[Figure]:
    """How long the responses are, and how many were cut at the limit."""
    made = []
    for number, data in enumerate(sets, start=1):
        rows, said = [], []
        for model in data.models:
            predictions = model.evaluation.predictions
            if predictions:
                lengths = sorted(p.num_tokens for p in predictions)
                cut = 100 - sum(p.score("ended") or 0 for p in predictions) / len(predictions)
                low, high = (lengths[int(tail * (len(lengths) - 1))] for tail in (0.1, 0.9))
                mean = sum(lengths) / len(lengths)
                rows.append((model.label, mean, low, high, _slot(runs, model)))
                said.append(f"{model.label}: {mean:.0f} tokens, {cut:.0f}% cut at the limit")
        if rows:
            figure = intervals(
                directory,
                f"lengths-{number}",
                f"Response length on {data.name}",
                f"{'; '.join(said)}. Dots: means; bars: from the shortest tenth to the longest.",
                rows,
                unit="tokens",
            )
            made.append(figure)
    return made


def cost_figure(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """Seconds a step: generation, the teacher's passes, the student's, heads and losses."""
    known = {
        label: costs
        for label, own in runs_of_methods(runs).items()
        if (costs := [c for run in own if (c := cost(run))])
    }
    if not known:
        return []
    parts = {
        words: [
            sum(getattr(c, f"seconds_{part}") / c.steps for c in own) / len(own)
            for own in known.values()
        ]
        for part, words in COST_PARTS.items()
    }
    said = []
    for label, *took in zip(known, *parts.values(), strict=True):
        share = 100 * took[0] / sum(took) if sum(took) else 0.0
        said.append(f"{label}: {digits(sum(took))} s a step, {share:.0f}% of it generation")
    return [
        stacked_bars(
            directory,
            "cost",
            "Where the time went",
            f"{'; '.join(said)}.",
            [*known],
            list(parts.items()),
            unit="seconds per step",
        )
    ]


def _band(series: Sequence[Series]) -> str:
    return " Means over training seeds; bands: all of them." if series[0].low else ""


def _losses(runs: Sequence[Run], directory: Path) -> list[Figure]:
    """One axis per objective: what different methods minimise can't be compared."""
    methods = dict.fromkeys(run.method_of_study or run.method for run in runs)
    made: list[Figure] = []
    for number, method in enumerate(methods, start=1):
        own = [run for run in runs if (run.method_of_study or run.method) == method]
        which = f" of {method}" if len(methods) > 1 else ""
        curve = ("loss", f"Training loss{which}", "nats per token", "What the method minimises.")
        suffix = f"-{number}" if len(methods) > 1 else ""
        slot = number - 1 if runs[0].method_of_study else 0
        made += _step_figures(own, directory, [curve], suffix, slot)
    return made


def _step_figures(
    runs: Sequence[Run],
    directory: Path,
    curves: Sequence[tuple[str, str, str, str]],
    suffix: str = "",
    first_slot: int = 0,
) -> list[Figure]:
    made = []
    for key, title, unit, note in curves:
        points = partial(_step_points, key=key)
        series = series_of(runs, points, first_slot=first_slot)
        if series:
            figure = lines(
                directory,
                f"training-{key.replace('_', '-')}{suffix}",
                title,
                f"{change(series)} {note}{_band(series)}",
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


def series_of(
    runs: Sequence[Run],
    points: Callable[[Run], list[tuple[float, float]]],
    mark: bool = False,
    first_slot: int = 0,
) -> list[Series]:
    """One line per run that has points; ``mark`` marks the first one and the kept step's.

    The seeds of a study's method are one line, their mean, in a band from the least to the most.
    """
    made = []
    for slot, (label, own) in enumerate(runs_of_methods(runs).items(), first_slot):
        found = [dict(values) for run in own if (values := points(run))]
        if not found:
            continue
        x = [step for step in found[0] if all(step in values for values in found)]
        several = [[values[step] for values in found] for step in x]
        kept = x.index(own[0].kept_step) if own[0].kept_step in x else len(x) - 1
        series = Series(
            label=label,
            x=x,
            y=[sum(values) / len(values) for values in several],
            slot=slot,
            low=[min(values) for values in several] if len(found) > 1 else None,
            high=[max(values) for values in several] if len(found) > 1 else None,
            marked=tuple(dict.fromkeys((0, kept))) if mark and len(own) == 1 else (),
        )
        made.append(series)
    return made if any(any(one.y) for one in made) else []  # nothing flat at zero


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


def change(series: Sequence[Series]) -> str:
    """``From 1.2 to 0.8.``, over the first and last tenth where there are many points."""
    said = []
    for one in series:
        tenth = max(1, len(one.y) // 10)
        first, last = sum(one.y[:tenth]) / tenth, sum(one.y[-tenth:]) / tenth
        words = f"from {digits(first)} to {digits(last)}"
        said.append(words.capitalize() if len(series) == 1 else f"{one.label}: {words}")
    many = max(len(one.y) for one in series) >= 20
    return "; ".join(said) + (" (means of the first and last tenth)." if many else ".")
