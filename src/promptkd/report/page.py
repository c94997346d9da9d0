"""The page: what goes into it, in order; how it looks is in ``templates/``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from promptkd.report import plots
from promptkd.report.cost import cost
from promptkd.report.data import DataSet, Run
from promptkd.report.figures import Figure
from promptkd.report.findings import (
    answer,
    decoding_words,
    describe,
    distance,
    headline,
    leading_run,
    score_name,
    size_share,
    warnings,
)
from promptkd.report.numbers import count, digits, duration, plain
from promptkd.report.prompt import PromptFindings, prompt_findings
from promptkd.report.responses import embedded, response_sets
from promptkd.report.tables import Table, cost_table, judge_table, overview_table, score_table


@dataclass(frozen=True)
class Mark:
    """A place on a number's scale, in percent of its width."""

    label: str
    place: float
    role: str


@dataclass(frozen=True)
class LargeNumber:
    """One of the few numbers that open the page.

    Attributes:
        fill: how much of the scale is filled, in percent; None for no scale.
        band: an interval on the scale, in percent of its width.
        marks: what else stands on the scale.
    """

    label: str
    value: str
    unit: str
    detail: str
    fill: float | None = None
    band: tuple[float, float] | None = None
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class PageSection:
    """A heading, a sentence that says what to look for, and what is there to see."""

    id: str
    title: str
    lead: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    prompts: tuple[PromptFindings, ...] = ()

    @property
    def all_tables(self) -> list[Table]:
        return [*self.tables, *(table for prompt in self.prompts for table in prompt.tables)]


def render(runs: Sequence[Run], sets: Sequence[DataSet], directory: Path) -> str:
    """Draw the figures, write the tables, and return the page."""
    figures, tables = directory / "figures", directory / "tables"
    sections = [s for s in _sections(runs, sets, figures) if s.figures or s.tables or s.prompts]
    overview = overview_table(runs, sets)
    for table in [overview, *(t for section in sections for t in section.all_tables)]:
        table.write(tables)
    responses = response_sets(runs, sets)
    leader = leading_run(runs, sets)
    environment = Environment(
        loader=PackageLoader("promptkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=_title(runs),
        answer=answer(runs, sets),
        rests_on=_rests_on(runs, sets),
        numbers=_large_numbers(leader, sets),
        leader=leader.label if len(runs) > 1 else None,
        overview=overview if len(runs) > 1 else None,
        notes=_notes(runs, sets),
        sections=sections,
        responses=responses,
        payload=Markup(embedded(responses)),
        records=[_record(run) for run in runs],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("promptkd"),
        svg=Markup,
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    teacher = (runs[0].recipe.get("teacher") or {}).get("model")
    return f"{runs[0].label}: " + (
        f"a student of {Path(str(teacher)).name}" if teacher else "a student"
    )


def _rests_on(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    """Data, seeds and settings behind the answer."""
    said = []
    if sets and sets[0].of_role("run"):
        said.append(f"Scores: {describe(sets[0])}; {decoding_words(sets[0].evaluation)}.")
    found = dict.fromkeys(d.where for run in runs if (d := distance(run, sets)))
    said += [f"Distance: KL(student ‖ teacher), each on its own responses, on {w}." for w in found]
    return said


def _large_numbers(run: Run, sets: Sequence[DataSet]) -> list[LargeNumber]:
    numbers = []
    found = distance(run, sets)
    if found:
        top = max(found.start, found.end)
        numbers.append(
            LargeNumber(
                label="Distance to the teacher",
                value=digits(found.end),
                unit="nats per token",
                detail=f"{digits(found.start)} at the start",
                fill=100 * found.end / top if top else 0.0,
                marks=(Mark("start", 100 * found.start / top if top else 0.0, "start"),),
            )
        )
    score = _score_number(run, sets)
    if score:
        numbers.append(score)
    summary, share = run.summary or {}, size_share(run)
    if summary.get("student_parameters"):
        value, _, unit = count(summary["student_parameters"]).partition(" ")
        units = {"M": "million parameters", "B": "billion parameters"}
        teacher = summary.get("teacher_parameters")
        numbers.append(
            LargeNumber(
                label="Size",
                value=value,
                unit=units.get(unit, "parameters"),
                detail=f"{100 * share:.0f}% of the teacher's {count(teacher)}"
                if share and teacher
                else "no teacher to compare with",
                fill=100 * share if share and share <= 1 else None,
            )
        )
    took = cost(run)
    if took and took.tokens_per_second:
        seconds = took.seconds_writing + took.seconds_learning
        numbers.append(
            LargeNumber(
                label="Speed of training",
                value=count(took.tokens_per_second),
                unit="tokens per second",
                detail=f"{took.steps:,} steps in {duration(seconds)}, "
                f"{100 * took.seconds_writing / seconds:.0f}% of it generating responses",
                fill=100 * took.seconds_writing / seconds,
            )
        )
    return numbers


def _score_number(run: Run, sets: Sequence[DataSet]) -> LargeNumber | None:
    for data in sets:
        score = headline(data)
        if score is None:
            continue
        scores = {(m.label, m.role): m.evaluation.scores.get(score) for m in data.models}
        own = scores.get((run.label, "run"))
        if not own or not own.interval_95:
            continue
        low, high = own.interval_95
        others = {who: s.mean for who, s in scores.items() if s and who[1] in ("start", "teacher")}
        top = 1.1 * max([high, *others.values(), 1e-9])
        marks = [Mark(label, 100 * mean / top, role) for (label, role), mean in others.items()]
        marks.append(Mark("student", 100 * own.mean / top, "run"))
        known = [f"{label} {mean:.1f}" for (label, _), mean in others.items()]
        detail = f"95% interval {plain(low)} to {plain(high)}"
        return LargeNumber(
            label=f"{score_name(score)} on {data.name}",
            value=f"{own.mean:.1f}",
            unit="percent",
            detail="; ".join([detail, *known]),
            fill=0.0,
            band=(100 * low / top, 100 * high / top),
            marks=tuple(marks),
        )
    return None


def _notes(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [note for run in runs for note in run.notes]
    evaluated = {m.label for data in sets for m in data.of_role("run")}
    for run in runs:
        if run.label not in evaluated:
            notes.append(
                f"{run.label} was not evaluated on held-out data. "
                f"Run: promptkd evaluate {run.path} --data FILE"
            )
        cut = ((run.summary or {}).get("preflight") or {}).get("teacher_mass_outside", 0.0)
        if cut >= 0.001:
            notes.append(
                f"{run.label}: up to {100 * cut:.2g}% of the teacher's probability lies on tokens "
                "that the student doesn't have; it is left out of every KL."
            )
        empty = sum(row.get("num_empty", 0) for row in run.steps)
        if empty:
            notes.append(
                f"{run.label}: the student generated {empty:,} empty responses in training."
            )
    if len(runs) > 1:
        notes += [f"{run.label}: {w}." for run in runs for w in warnings(run, sets)]
        notes += _starts(runs)
    if any(len(data.evaluation.seeds) == 1 for data in sets):
        notes.append("Some scores come from a single decoding seed.")
    return notes


def _starts(runs: Sequence[Run]) -> list[str]:
    """Where runs compared with each other did not begin alike."""
    starts = {run.label: str((run.recipe.get("student") or {}).get("model")) for run in runs}
    notes = [
        f"{run.label} starts with the student of {other.label}."
        for run in runs
        for other in runs
        if other.is_at(starts[run.label])
    ]
    return notes or ["The runs start with different students."] * (len(set(starts.values())) > 1)


def _sections(runs: Sequence[Run], sets: Sequence[DataSet], figures: Path) -> list[PageSection]:
    judged, took = judge_table(runs), cost_table(runs)
    scored = tuple(score_table(data, number) for number, data in enumerate(sets, start=1))
    return [
        PageSection(
            id="scores",
            title="Scores",
            lead="Held-out requests, one response per request and seed. The start and the teacher "
            "stand beside the students where they were evaluated alike.",
            figures=(
                *plots.score_figures(runs, sets, figures),
                *plots.length_figures(runs, sets, figures),
            ),
            tables=(*scored, *([judged] if judged else [])),
        ),
        PageSection(
            id="training",
            title="Training",
            lead="Step by step; thick lines are moving averages where there are many points.",
            figures=tuple(plots.training_figures(runs, figures)),
        ),
        PageSection(
            id="exposure",
            title="Exposure bias",
            lead="Does the student err more after its own text than after the teacher's? Errors "
            "are KL(teacher ‖ student), summed from the first token of the response.",
            figures=tuple(plots.exposure_figures(runs, figures)),
        ),
        PageSection(
            id="prompt",
            title="What the prompt did",
            lead="The soft prompt in front of the frozen teacher is all that PromptKD "
            "trains there.",
            figures=tuple(plots.prompt_figures(runs, figures)),
            prompts=tuple(prompt_findings(runs)),
        ),
        PageSection(
            id="cost",
            title="Cost",
            lead="Generating responses, then learning from them.",
            figures=tuple(plots.cost_figure(runs, figures)),
            tables=(took,) if took else (),
        ),
    ]


def _record(run: Run) -> dict[str, Any]:
    """Recipe and environment of a run, as text."""
    environment = run.environment.get("environment") or {}
    facts = [
        (key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value)
        for key, value in environment.items()
        if value is not None
    ]
    return {
        "label": run.label,
        "path": str(run.path),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        "method": (run.environment.get("identity") or {}).get("method", run.method),
        "facts": facts,
        "summary": json.dumps(run.summary, indent=2, ensure_ascii=False) if run.summary else "",
    }
