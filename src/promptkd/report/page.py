"""The HTML page: which numbers, figures and tables it shows. Its looks are in ``templates/``."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from promptkd.bars import progress_bar
from promptkd.report import plots
from promptkd.report.cells import Table
from promptkd.report.comparisons import decoding_words, describe, is_greedy
from promptkd.report.data import DataSet, Run
from promptkd.report.exposure_plots import exposure_figures
from promptkd.report.figures import Figure
from promptkd.report.findings import answer, distance, leading_run, warnings
from promptkd.report.opening import example, large_numbers
from promptkd.report.places import Subject
from promptkd.report.prompt import PromptFindings, prompt_findings
from promptkd.report.responses import embedded, response_sets
from promptkd.report.savings import savings
from promptkd.report.study import EXPOSURE_BIAS, StudyOutline, difference_figures
from promptkd.report.tables import (
    cost_table,
    judge_table,
    overview_table,
    score_table,
)

BY_METHOD = (
    "A method's score is the mean over its training seeds, and its interval covers requests and "
    "training seeds: one lucky seed doesn't make a method better. Established: p below 0.05 after "
    "Holm's correction over the methods compared."
)
NUM_SECTIONS = 5


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


def render(subject: Subject, directory: Path) -> str:
    """Draw the figures, write the tables, and return the page."""
    figures, tables = directory / "figures", directory / "tables"
    sets = subject.data_sets()
    shown = {"desc": "drawing the report", "total": NUM_SECTIONS, "unit": "section"}
    drawn = progress_bar(_sections(subject, sets, figures), **shown)
    sections = [s for s in drawn if s.figures or s.tables or s.prompts]
    opening = _opening_table(subject, sets)
    for table in [opening, *(t for section in sections for t in section.all_tables)]:
        if table:
            table.write(tables)
    responses = response_sets(subject.runs, sets)
    leader = leading_run(subject.runs, sets)
    environment = Environment(
        loader=PackageLoader("promptkd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=_title(subject),
        answer=_answer(subject, sets),
        rests_on=_rests_on(subject, sets),
        numbers=large_numbers(subject, leader, sets),
        whose=_whose(subject, leader),
        example=example(responses[0] if responses else None, leader.label),
        overview=opening,
        notes=_notes(subject, sets),
        sections=sections,
        responses=responses,
        payload=Markup(embedded(responses)),
        records=[_record(run) for run in subject.runs],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("promptkd"),
        svg=Markup,
        unbroken=_unbroken,
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
    )


def _answer(subject: Subject, sets: Sequence[DataSet]) -> list[str]:
    if subject.study is None:
        return answer(subject.runs, sets)
    said = [s for text in subject.study.statements for s in re.split(r"(?<=\.) (?=\D)", text)]
    return said or ["No run of the study is scored yet."]


def _opening_table(subject: Subject, sets: Sequence[DataSet]) -> Table | None:
    if subject.study:
        return subject.study.methods_table
    return overview_table(subject.runs, sets) if len(subject.runs) > 1 else None


def _whose(subject: Subject, leader: Run) -> str | None:
    """Above the numbers, where it isn't obvious whose they are."""
    if subject.study:
        return "The students in numbers"
    return f"{leader.label} in numbers" if len(subject.runs) > 1 else None


def _unbroken(detail: str) -> str:
    """Breaks only between an interval and what it means."""
    for joint in (", ", "p <", "p 0", "< 0", "not established", " tokens"):
        detail = detail.replace(joint, joint.replace(" ", "\u00a0"))
    return detail


def _asset(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _title(subject: Subject) -> str:
    runs = subject.runs
    if subject.study:
        return _title_of_study(subject.study)
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    teacher = Path(str((runs[0].recipe.get("teacher") or {}).get("model") or ""))
    name = teacher.parent.name if teacher.name == "student" else teacher.name
    return f"{runs[0].label}: a student" + (f" of {name}" if name else "")


def _title_of_study(study: StudyOutline) -> str:
    methods, seeds = len(study.methods), len(study.seeds)
    title = f"A study of {methods} methods, {seeds} training seed{'s' * (seeds > 1)} each"
    done = sum(len(study.scores[0].training_seeds.get(name, ())) for name in study.methods)
    return title + ("" if done == methods * seeds else f": {done} of {methods * seeds} runs so far")


def _rests_on(subject: Subject, sets: Sequence[DataSet]) -> list[str]:
    """Data, seeds and settings behind the answer."""
    said, runs = [], subject.runs
    if sets and sets[0].of_role("run"):
        said.append(f"Scores: {describe(sets[0])}; {decoding_words(sets[0].evaluation)}.")
    if subject.study:
        said.append(BY_METHOD)
    else:
        found = dict.fromkeys(d.where for run in runs if (d := distance(run, sets)))
        said += [
            f"Distance: KL(student ‖ teacher), each on its own responses, on {w}." for w in found
        ]
    measured = (s for run in runs if (s := savings(run, sets)))
    said += [f"Speed: {s.how}." for s in list(measured)[:1]]
    return said


def _notes(subject: Subject, sets: Sequence[DataSet]) -> list[str]:
    """What a reader must know before believing the numbers."""
    runs = subject.runs
    notes = [note for run in runs for note in run.notes]
    evaluated = {m.label for data in sets for m in data.of_role("run")}
    for run in runs:
        if (run.method_of_study or run.label) not in evaluated:
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
    if len(runs) > 1 and not subject.study:
        notes += [f"{run.label}: {w}." for run in runs for w in warnings(run, sets)]
        notes += _starts(runs)
    for data in sets:
        if len(data.evaluation.seeds) == 1 and not is_greedy(data.evaluation):
            notes.append(f"{data.name}: one decoding seed; another would give other responses.")
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


def _sections(subject: Subject, sets: Sequence[DataSet], figures: Path) -> Iterator[PageSection]:
    """Drawn one by one; there are ``NUM_SECTIONS``."""
    runs = subject.runs
    judged, took = judge_table(runs), cost_table(runs)
    study = subject.study
    scored = study.tables if study else [score_table(d, n) for n, d in enumerate(sets, start=1)]
    biased = [table for table in scored if table.name == EXPOSURE_BIAS]
    yield PageSection(
        id="scores",
        title="Scores",
        lead="Held-out requests, one response per request and seed. The start and the teacher "
        "stand beside the students where they were evaluated alike.",
        figures=(
            *(difference_figures(study, figures) if study else ()),
            *plots.score_figures(runs, sets, figures),
            *plots.length_figures(runs, sets, figures),
        ),
        tables=(*(t for t in scored if t not in biased), *([judged] if judged else [])),
    )
    yield PageSection(
        id="training",
        title="Training",
        lead="Step by step; thick lines are moving averages where there are many points.",
        figures=tuple(plots.training_figures(runs, figures)),
    )
    yield PageSection(
        id="exposure",
        title="Exposure bias",
        lead="Does the student err more after its own text than after the teacher's? Errors "
        "are KL(teacher ‖ student), summed from the first token of the response.",
        figures=tuple(exposure_figures(runs, figures)),
        tables=tuple(biased),
    )
    yield PageSection(
        id="prompt",
        title="What the prompt did",
        lead="The soft prompt in front of the frozen teacher is all that PromptKD trains there.",
        figures=tuple(plots.prompt_figures(runs, figures)),
        prompts=tuple(prompt_findings(runs)),
    )
    yield PageSection(
        id="cost",
        title="Cost",
        lead="Generating responses, then learning from them.",
        figures=tuple(plots.cost_figure(runs, figures)),
        tables=(took,) if took else (),
    )


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
