"""The report's section on the soft prompt, from ``prompt_analysis.json`` of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from promptkd.numbers import digits, plain, signed
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import Comparison, comparison_words
from promptkd.report.data import Row, Run

SPACE_MARKS = {"Ġ": "␣", "▁": "␣", "Ċ": "↵"}
KL_HEADINGS = {
    "kl_teacher_first_student": "KL(teacher ‖ first student)",
    "kl_teacher_final_student": "KL(teacher ‖ final student)",
    "kl_first_student_teacher": "KL(first student ‖ teacher)",
    "kl_final_student_teacher": "KL(final student ‖ teacher)",
}


@dataclass(frozen=True)
class Pair:
    """One request and each model's response."""

    request: str
    responses: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PromptFindings:
    """One run's part of the section."""

    heading: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    pairs: tuple[Pair, ...]


def prompt_findings(runs: Sequence[Run]) -> list[PromptFindings]:
    """One entry per run whose prompt was analysed."""
    analysed = [(number, run) for number, run in enumerate(runs, start=1) if run.prompt_analysis]
    found = []
    for number, run in analysed:
        analysis = run.prompt_analysis or {}
        tables = [_kl_table(analysis, number), _vector_table(analysis, number)]
        pairs = [
            Pair(
                row["request"],
                tuple(
                    (model, row[key])
                    for model, key in (
                        ("teacher", "teacher"),
                        ("teacher with its prompt", "prompted_teacher"),
                        ("student", "student"),
                    )
                    if key in row
                ),
            )
            for row in analysis.get("responses", [])
        ]
        found.append(
            PromptFindings(
                heading=run.label if len(runs) > 1 else "",
                sentences=tuple(_sentences(analysis)),
                tables=tuple(table for table in tables if table),
                pairs=tuple(pairs),
            )
        )
    return found


def _sentences(analysis: Row) -> list[str]:
    said = []
    last = _on_student(analysis.get("drift", []))
    if last and "kl_prompted_plain" in last:
        drift = last["kl_prompted_plain"]
        low, high = drift["interval_95"]
        said.append(
            f"With its prompt the teacher is {digits(drift['mean'])} nats per token from itself "
            f"without (95% interval {digits(low)} to {digits(high)}), on the student's responses "
            f"to the {last['data']} requests."
        )
    change = _on_student(analysis.get("differences", []))
    if change and "kl_teacher_final_student" in change:
        found = _comparison(change["kl_teacher_final_student"])
        if found.shown:
            way = "closer to" if found.difference < 0 else "farther from"
            said.append(
                f"The prompt puts it {digits(abs(found.difference))} nats per token {way} the "
                f"final student (95% interval of the change {_nats(found)})."
            )
        else:
            said.append(
                "Closer to the final student or farther from it: no difference shown "
                f"(95% interval of the change {_nats(found)} nats per token)."
            )
    if change and "rouge_l" in change:
        words = comparison_words(_comparison(change["rouge_l"]))
        said.append(f"Its own ROUGE-L with the prompt: {words}.")
    moved = [v["moved_share"] for v in analysis.get("vectors", []) if v.get("moved_share")]
    if moved:
        mean = 100 * sum(moved) / len(moved)
        said.append(
            f"Its {len(moved)} vectors moved by {digits(mean)}% of their length on average."
        )
    return said


def _on_student(rows: Sequence[Row]) -> Row | None:
    """The row about held-out requests and the student's responses, or the training requests'."""
    own = [row for row in rows if row.get("responses") == "student"]
    return own[-1] if own else None


def _comparison(value: Row) -> Comparison:
    low, high = value["interval_95"]
    return Comparison(
        first="with prompt", second="without", difference=value["mean"], low=low, high=high
    )


def _nats(comparison: Comparison) -> str:
    return f"{digits(comparison.low)} to {digits(comparison.high)}"


def _kl_table(analysis: Row, number: int) -> Table | None:
    shown = [key for key in KL_HEADINGS if any(key in row for row in analysis.get("table_4", []))]
    if not shown:
        return None
    changes = {(row["data"], row["responses"]): row for row in analysis.get("differences", [])}
    rows = []
    for row in analysis["table_4"]:
        change = changes.get((row["data"], row["responses"]), {}) if row["prompt"] else {}
        label = f"{row['data']}, on the {row['responses']}'s responses"
        if row["responses"] == "reference":
            label = f"{row['data']}, on the references"
        cells = [Cell(label, "with prompt" if row["prompt"] else "without prompt")]
        cells += [Cell(digits(row[key]), _change(change.get(key), digits)) for key in shown]
        cells += [
            Cell(f"{row[key]:.1f}", _change(change.get(key))) if key in row else Cell("–")
            for key in ("rouge_l", "response_length", "ended")
        ]
        rows.append(tuple(cells))
    decoding = analysis.get("num_examples", {})
    counts = ", ".join(f"{size} {name} requests" for name, size in decoding.items())
    caption = (
        f"The teacher without and with its prompt; {counts}, seed {analysis.get('seed')}. KLs in "
        "nats per response token, teacher-forced. ROUGE-L, length and share ended are of responses "
        "the teacher generated itself. Small: change by the prompt, 95% interval over requests."
    )
    headings = ("Where", *(KL_HEADINGS[key] for key in shown), "ROUGE-L", "Length", "Ended, %")
    return Table(
        name=f"prompt-kl-{number}",
        title="Teacher without and with its prompt",
        caption=caption,
        headings=headings,
        rows=tuple(rows),
    )


def _change(value: Row | None, written: Callable[[float], str] = plain) -> str:
    if not value or "interval_95" not in value:
        return ""
    low, high = value["interval_95"]
    return f"{signed(value['mean'], written)} [{written(low)}, {written(high)}]"


def _vector_table(analysis: Row, number: int) -> Table | None:
    vectors = analysis.get("vectors") or []
    if not vectors:
        return None
    rows = tuple(
        (
            Cell(str(vector["position"] + 1)),
            Cell(_token(vector["initial_token"])),
            Cell("\u2002".join(_token(near) for near in vector["nearest_by_cosine"])),
            Cell(digits(vector["moved"])),
            Cell(f"{digits(100 * vector['moved_share'])}%")
            if vector.get("moved_share") is not None
            else Cell("–"),
            Cell(f"{vector['cosine_to_initial']:.3f}"),
        )
        for vector in vectors
    )
    return Table(
        name=f"prompt-vectors-{number}",
        title="The vectors of the prompt",
        caption="Nearest tokens by cosine, nearest first; ␣ is a space. Moved: Euclidean "
        "distance from the start, and as a share of the starting length.",
        headings=(
            "Vector",
            "Started at",
            "Nearest tokens now",
            "Moved",
            "Share",
            "Cosine to start",
        ),
        rows=rows,
    )


def _token(token: dict[str, Any]) -> str:
    text = str(token.get("token") or token.get("id"))
    for mark, shown in SPACE_MARKS.items():
        text = text.replace(mark, shown)
    return text.replace("\n", "↵").replace(" ", "␣")
