"""The report's tables: what each one shows."""

from collections.abc import Callable, Sequence

from promptkd.evaluation.results import Evaluation
from promptkd.numbers import count, digits, duration, like, plain, signed, size
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import (
    RANKED,
    Comparison,
    best_model,
    between,
    decoding_words,
    describe,
    headline,
    number_of,
    score_name,
    shown_scores,
)
from promptkd.report.cost import cost
from promptkd.report.data import DataSet, Model, Run
from promptkd.report.findings import distance, size_share
from promptkd.report.savings import Savings, savings

NONE = Cell("–")
COST_HEADINGS = (
    "Run",
    "Steps",
    "Tokens",
    "Time",
    "Generating a step",
    "Teacher a step",
    "Student a step",
    "Losses a step",
    "Tokens/s",
    "FLOP/s",
    "Peak memory",
    "By student",
    "Padding",
)


def score_table(data: DataSet, number: int) -> Table:
    """All models on one data set, with paired differences to what they should be compared with.

    That is, of several runs, the best by that score; else the start.
    """
    runs, shown, compared = data.of_role("run"), shown_scores(data), headline(data)
    best = {score: best_model(runs, score) for score in RANKED if score in shown}
    first = _baseline(data, compared or "")
    others = [first, *data.of_role("teacher")[:1]] if compared else []
    against = [m for m in _once(others) if len(data.models) > 1]
    place = 2 + shown.index(compared) if compared else 0
    headings, rows = ["Model", *map(score_name, shown)], []
    headings[place:place] = [f"{score_name(compared or '')} − {m.label}" for m in against]
    for model in data.models:
        scores = model.evaluation.scores
        cells = [
            _score_cell(model.evaluation, s, best.get(s) == model.label) if s in scores else NONE
            for s in shown
        ]
        cells[place - 1 : place - 1] = [
            NONE if model is m else comparison_cell(between(model, m, compared or ""))
            for m in against
        ]
        rows.append((Cell(model.label), *cells))
    caption = (
        f"{describe(data)}; {decoding_words(data.evaluation)}. Square brackets: 95% bootstrap "
        f"interval over requests; ±: standard deviation over decoding seeds."
    )
    if against:
        caption += " Differences are paired by request."
    if len(runs) > 1:
        caption += (
            " Bold: better than every other, each difference shown; "
            "intervals are not corrected for the number of comparisons."
        )
    return Table(
        name=f"scores-{number}-{safe_name(data.name)}",
        title=data.name,
        caption=caption,
        headings=tuple(headings),
        rows=tuple(rows),
    )


def _once(models: Sequence[Model | None]) -> list[Model]:
    return list({model.label: model for model in models if model is not None}.values())


def comparison_cell(comparison: Comparison | None) -> Cell:
    """The difference with its interval, or that none is shown."""
    if comparison is None:
        return Cell("not comparable")
    interval = f"[{plain(comparison.low)}, {plain(comparison.high)}]"
    verdict = "" if comparison.shown else " no difference shown"
    return Cell(signed(comparison.difference), f"{interval}{verdict}")


def overview_table(runs: Sequence[Run], sets: Sequence[DataSet]) -> Table:
    """One line per run: how good, how close, at what size and speed, at what cost.

    The start and the teacher stand below, where they answered the first data set, too.
    """
    data = next((d for d in sets if headline(d) and d.of_role("run")), None)
    rows = [
        (
            Cell(run.label, run.method if run.method not in run.label else ""),
            *([_headline_cell(data, data.of_run(run))] if data else []),
            *_distance_and_size(run, sets),
            *_speed_and_memory(savings(run, sets)),
            Cell(duration(took.seconds_generation + took.seconds_learning))
            if (took := cost(run))
            else NONE,
        )
        for run in runs
    ]
    if data:
        rows += [_beside(data, m) for m in (*data.of_role("start"), *data.of_role("teacher"))]
    scored = (
        f"Score: {describe(data)}, square brackets: 95% interval over requests. " if data else ""
    )
    return Table(
        name="overview",
        title="The runs",
        caption=f"{scored}KL(student ‖ teacher), start → kept student; size, tokens generated a "
        "second and memory of the weights, each with its share of the teacher's; time of the "
        "training steps.",
        headings=(
            "Model",
            *([score_name(headline(data) or "")] if data else []),
            "KL to teacher, nats/token",
            "Parameters",
            "Tokens/s",
            "Memory",
            "Trained",
        ),
        rows=tuple(rows),
    )


def _beside(data: DataSet, model: Model) -> tuple[Cell, ...]:
    """The line of a start or a teacher."""
    measured = model.evaluation.size_and_speed
    size_cell = Cell(count(measured["parameters"])) if measured else NONE
    speed = _speed_and_memory(Savings(measured, None) if measured else None)
    return (
        Cell(model.label),
        _headline_cell(data, model),
        NONE,
        size_cell,
        *speed,
        NONE,
    )


def _headline_cell(data: DataSet, model: Model | None) -> Cell:
    score = headline(data) or ""
    if model is None or score not in model.evaluation.scores:
        return NONE
    best = best_model(data.of_role("run"), score) == model.label
    return _score_cell(model.evaluation, score, best)


def _distance_and_size(run: Run, sets: Sequence[DataSet]) -> tuple[Cell, Cell]:
    far, share = distance(run, sets), size_share(run)
    parameters = (run.summary or {}).get("student_parameters")
    return (
        Cell(f"{digits(far.start)} → {digits(far.end)}") if far else NONE,
        Cell(count(parameters), f"{100 * share:.0f}%" if share else "") if parameters else NONE,
    )


def _speed_and_memory(found: Savings | None) -> tuple[Cell, Cell]:
    return _measured(found, "tokens_per_second", count), _measured(found, "bytes_memory", size)


def _measured(found: Savings | None, key: str, words: Callable[[float], str]) -> Cell:
    if found is None:
        return NONE
    share = found.share(key)
    return Cell(words(found.student[key]), f"{100 * share:.0f}%" if share else "")


def cost_table(runs: Sequence[Run]) -> Table | None:
    """What training took."""
    rows = []
    for run in runs:
        took = cost(run)
        if took is None:
            continue
        seconds = took.seconds_generation + took.seconds_learning
        padding = [r["padding_share"] for r in run.steps if r.get("padding_share") is not None]
        written = sum(r.get("student_share", 0.0) for r in run.steps) / len(run.steps)
        rows.append(
            (
                Cell(run.label),
                Cell(f"{took.steps:,}"),
                Cell(count(took.tokens)),
                Cell(duration(seconds)),
                Cell(f"{digits(took.seconds_generation / took.steps)} s"),
                Cell(f"{digits(took.seconds_teacher / took.steps)} s"),
                Cell(f"{digits(took.seconds_student / took.steps)} s"),
                Cell(f"{digits(took.seconds_losses / took.steps)} s"),
                Cell(count(took.tokens_per_second)),
                Cell(f"{took.flop_rate / 1e9:.0f} G" if took.flops else "–"),
                Cell(f"{took.peak_memory / 1e9:.1f} GB" if took.peak_memory else "–"),
                Cell(f"{100 * written:.0f}%"),
                Cell(f"{100 * sum(padding) / len(padding):.0f}%" if padding else "–"),
            )
        )
    if not rows:
        return None
    return Table(
        name="cost",
        title="What training took",
        caption="Time of the steps alone: loading, validation and checkpoints are not counted. "
        "Tokens are response tokens. Teacher and student: their passes forward and backward; "
        "losses: output layers and all between them; FLOP/s: matmuls with weights, over the time "
        "spent learning.",
        headings=COST_HEADINGS,
        rows=tuple(rows),
    )


def judge_table(runs: Sequence[Run]) -> Table | None:
    """What judges said, one line per run, data and protocol."""
    rows = []
    for run in runs:
        for name, record in run.judgements.items():
            scores = record.get("scores") or {}
            headline = scores.get("score") or scores.get("win_rate")
            if not headline or headline.get("mean") is None:
                continue
            counts, judge = record.get("counts") or {}, record.get("judge") or {}
            interval = headline.get("interval_95")
            spread = f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
            rows.append(
                (
                    Cell(run.label),
                    Cell(name),
                    Cell(str(judge.get("model", "–"))),
                    Cell(f"{record.get('protocol')} against {record.get('against')}"),
                    Cell(
                        f"{headline['mean']:.1f}",
                        spread,
                    ),
                    Cell(f"{counts.get('judged', '–')} of {counts.get('pairs', '–')}"),
                    Cell(f"{scores['orders_agree']['mean']:.0f}%")
                    if scores.get("orders_agree")
                    else NONE,
                )
            )
    if not rows:
        return None
    return Table(
        name="judge",
        title="What the judge said",
        caption="Score: the model's grades as a percentage of the references'. "
        "Pairwise: percent of comparisons won in both orders, ties half. Brackets: 95% interval "
        "over requests.",
        headings=("Run", "Data", "Judge", "Protocol", "Result", "Judged", "Orders agree"),
        rows=tuple(rows),
    )


def _baseline(data: DataSet, score: str) -> Model | None:
    runs = data.of_role("run")
    if len(runs) > 1:
        known = [m for m in runs if score in m.evaluation.scores]
        return max(known, key=lambda m: m.evaluation.scores[score].mean, default=None)
    return next(iter(data.of_role("start")), None)


def _score_cell(evaluation: Evaluation, name: str, best: bool) -> Cell:
    score = evaluation.scores[name]
    text = number_of(name)(score.mean)
    interval, detail = score.interval_95, ""
    if interval:
        low, high = (like(text, end) for end in interval)
        detail = f"[{low}, {high}]"
    elif score.deviation_over_seeds:
        detail = f"± {digits(score.deviation_over_seeds)}"
    if name in RANKED and score.deviation_over_seeds:
        text += f" ± {score.deviation_over_seeds:.1f}"
    if score.num_requests and score.num_requests < evaluation.num_examples:
        detail = f"{detail} {score.num_requests} requests".strip()
    return Cell(text, detail, best)


def safe_name(name: str) -> str:
    """A data set's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
