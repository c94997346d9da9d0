"""The report's tables: shown on the page, saved as Markdown and LaTeX."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promptkd.evaluation.results import Evaluation
from promptkd.files import write_text
from promptkd.report.cost import cost
from promptkd.report.data import DataSet, Model, Run
from promptkd.report.findings import (
    RANKED,
    Comparison,
    best_model,
    between,
    decoding_words,
    describe,
    distance,
    headline,
    score_name,
    shown_scores,
    size_share,
)
from promptkd.report.numbers import count, digits, duration, plain, signed

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "→": r"$\to$",
}


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


@dataclass(frozen=True)
class Cell:
    """A value and what stands small beside it (its interval). ``best`` is printed bold."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Cells under headings; the first column names the row."""

    name: str
    title: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_markdown(self) -> str:
        """GitHub's tables; | in a cell is escaped."""
        lines = [
            "| " + " | ".join(_markdown(h) for h in self.headings) + " |",
            "|" + "---|" * len(self.headings),
        ]
        for row in self.rows:
            cells = []
            for cell in row:
                text = _markdown(cell.text)
                text = f"**{text}**" if cell.best else text
                cells.append(f"{text} {_markdown(cell.detail)}".strip())
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", _markdown(self.caption), ""])

    def to_latex(self) -> str:
        """A booktabs table."""
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(self.headings) - 1)}}}",
            r"\toprule",
            " & ".join(_latex(h) for h in self.headings) + r" \\",
            r"\midrule",
        ]
        for row in self.rows:
            cells = []
            for cell in row:
                text = _latex(cell.text)
                text = rf"\textbf{{{text}}}" if cell.best else text
                small = rf" {{\scriptsize {_latex(cell.detail)}}}" if cell.detail else ""
                cells.append(text + small)
            lines.append(" & ".join(cells) + r" \\")
        return "\n".join(
            [
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                rf"\caption{{{_latex(self.caption)}}}",
                r"\end{table}",
                "",
            ]
        )

    def to_text(self) -> str:
        """Columns under each other, for a terminal."""
        cells = [[f"{cell.text} {cell.detail}".strip() for cell in row] for row in self.rows]
        columns = list(zip(self.headings, *cells, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in zip(*columns, strict=True)
        ]
        return "\n".join([self.title, *lines, self.caption])

    def write(self, directory: Path) -> None:
        """Write NAME.md and NAME.tex."""
        write_text(directory / f"{self.name}.md", self.to_markdown())
        write_text(directory / f"{self.name}.tex", self.to_latex())


def score_table(data: DataSet, number: int) -> Table:
    """All models on one data set, with paired differences to what they should be compared with.

    With several runs the difference is to the best of them by that score, else to the start.
    """
    runs, shown, compared = data.of_role("run"), shown_scores(data), headline(data)
    best = {score: best_model(runs, score) for score in RANKED if score in shown}
    others = [_baseline(data, compared), *data.of_role("teacher")[:1]] if compared else []
    against = [m for m in others if m is not None and len(data.models) > 1]
    place = 2 + shown.index(compared) if compared else 0
    headings, rows = ["Model", *map(score_name, shown)], []
    headings[place:place] = [f"{score_name(compared or '')} − {m.label}" for m in against]
    for model in data.models:
        scores = model.evaluation.scores
        cells = [
            _score_cell(model.evaluation, s, best.get(s) == model.label)
            if s in scores
            else Cell("–")
            for s in shown
        ]
        cells[place - 1 : place - 1] = [
            Cell("–") if model is m else comparison_cell(between(model, m, compared or ""))
            for m in against
        ]
        rows.append((Cell(model.label), *cells))
    caption = (
        f"{describe(data)}; {decoding_words(data.evaluation)}. Square brackets: 95% bootstrap "
        "interval over requests; ±: standard deviation over seeds."
    )
    if against:
        caption += " Differences are paired by request."
    if len(runs) > 1:
        caption += (
            " Bold: better than every other run, each paired interval clear of zero; "
            "intervals are not corrected for the number of comparisons."
        )
    return Table(
        name=f"scores-{number}-{safe_name(data.name)}",
        title=data.name,
        caption=caption,
        headings=tuple(headings),
        rows=tuple(rows),
    )


def comparison_cell(comparison: Comparison | None) -> Cell:
    """The difference with its interval, or that none is shown."""
    if comparison is None:
        return Cell("not comparable")
    interval = f"[{plain(comparison.low)}, {plain(comparison.high)}]"
    text = signed(comparison.difference)
    return Cell(text, interval if comparison.shown else f"{interval} no difference shown")


def overview_table(runs: Sequence[Run], sets: Sequence[DataSet]) -> Table:
    """One line per run: how close, at what size, at what cost."""
    rows = []
    for run in runs:
        summary, took, far = run.summary or {}, cost(run), distance(run, sets)
        share = size_share(run)
        parameters = summary.get("student_parameters")
        rows.append(
            (
                Cell(run.label, run.method if run.method not in run.label else ""),
                Cell(f"{digits(far.start)} → {digits(far.end)}") if far else Cell("–"),
                Cell(count(parameters), f"{100 * share:.0f}%" if share else "")
                if parameters
                else Cell("–"),
                Cell(str(run.kept_step) if run.kept_step is not None else "–"),
                Cell(count(took.tokens_per_second)) if took else Cell("–"),
            )
        )
    return Table(
        name="overview",
        title="The runs",
        caption="KL(student ‖ teacher), start → kept student; size and its share of the teacher's; "
        "response tokens a second in training.",
        headings=("Run", "KL to teacher, nats/token", "Parameters", "Kept step", "Tokens/s"),
        rows=tuple(rows),
    )


def cost_table(runs: Sequence[Run]) -> Table | None:
    """What training took."""
    rows = []
    for run in runs:
        took = cost(run)
        if took is None:
            continue
        seconds = took.seconds_writing + took.seconds_learning
        padding = [r["padding_share"] for r in run.steps if r.get("padding_share") is not None]
        written = sum(r.get("student_share", 0.0) for r in run.steps) / len(run.steps)
        rows.append(
            (
                Cell(run.label),
                Cell(f"{took.steps:,}"),
                Cell(count(took.tokens)),
                Cell(duration(seconds)),
                Cell(f"{digits(took.seconds_writing / took.steps)} s"),
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
                    else Cell("–"),
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
    nats = name in ("reverse_kl_to_teacher", "cross_entropy", "teacher_cross_entropy")
    text = digits(score.mean) if nats else f"{score.mean:.1f}"
    interval, detail = score.interval_95, ""
    if interval:
        low, high = (digits(end) if nats else f"{end:.1f}" for end in interval)
        detail = f"[{low}, {high}]"
    elif score.deviation_over_seeds:
        detail = f"± {digits(score.deviation_over_seeds)}"
    if name in RANKED and score.deviation_over_seeds:
        detail += f" ± {score.deviation_over_seeds:.1f}"
    if score.num_requests and score.num_requests < evaluation.num_examples:
        detail = f"{detail} {score.num_requests} requests".strip()
    return Cell(text, detail, best)


def _markdown(text: str) -> str:
    for special in "\\|*_`<":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def safe_name(name: str) -> str:
    """A data set's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
