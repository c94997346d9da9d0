"""The page's first screen: a few large numbers and one example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promptkd.numbers import count, digits, duration, plain, size
from promptkd.report.comparisons import headline, in_words, score_name
from promptkd.report.cost import cost
from promptkd.report.data import DataSet, Row, Run
from promptkd.report.findings import distance, size_share
from promptkd.report.places import Subject
from promptkd.report.savings import Savings, savings, savings_of

UNITS = {"M": "million parameters", "B": "billion parameters"}
SHOWN_TEXT = 420
"""Characters of a text of the example; all of it stands among the responses."""


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
class Exchange:
    """One request and what everybody answered.

    Attributes:
        why: how it was chosen.
        responses: label, role and text of each.
    """

    why: str
    request: str
    reference: str
    responses: tuple[tuple[str, str, str], ...]


def large_numbers(subject: Subject, leader: Run, sets: Sequence[DataSet]) -> list[LargeNumber]:
    """How good, how large, how fast, how dear: of the leading run, or of all runs of a study."""
    if subject.study:
        measured = [(m, d) for d in sets for m in d.of_role("run") if m.evaluation.size_and_speed]
        found = savings_of(*measured[0]) if measured else None
        return [*_weights(leader, found), *_took_study(subject)]
    numbers = [_how_good(leader, sets), _distance(leader, sets)]
    return [
        *(number for number in numbers if number),
        *_weights(leader, savings(leader, sets)),
        *(_took_path(subject) if subject.seconds else _took(leader)),
    ]


def example(entry: Row | None, leader: str) -> Exchange | None:
    """The middle one of the requests, by the leading model's score; of the first data set."""
    if entry is None or entry["score"] is None:
        return None
    labels = [model["label"] for model in entry["models"]]
    place = labels.index(leader) if leader in labels else 0
    scored = [(s, item) for item in entry["items"] if (s := _score(item, place)) is not None]
    if not scored:
        return None
    scored.sort(key=lambda found: (found[0], found[1]["row"]))
    score, chosen = scored[len(scored) // 2]
    value = in_words(entry["score"], score)
    return Exchange(
        why=f"Row {chosen['row']} of {entry['name']}: the middle of {len(scored)} requests by "
        f"{labels[place]}'s score ({value}).",
        request=_short(chosen["request"]) or "(The request isn't kept with these results.)",
        reference=_short(next(iter(chosen["references"]), "")),
        responses=tuple(
            (model["label"], model["role"], _short(own[0]["text"]))
            for model, own in zip(entry["models"], chosen["responses"], strict=True)
            if own
        ),
    )


def _score(item: Row, place: int) -> float | None:
    """Of a model's first response."""
    own = item["responses"][place]
    return own[0]["score"] if own else None


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT].rstrip()} …"


def _distance(run: Run, sets: Sequence[DataSet]) -> LargeNumber | None:
    found = distance(run, sets)
    if not found:
        return None
    top = max(found.start, found.end)
    return LargeNumber(
        label="Distance to the teacher",
        value=digits(found.end),
        unit="nats per token",
        detail=f"{digits(found.start)} at the start",
        fill=100 * found.end / top if top else 0.0,
        marks=(Mark("start", 100 * found.start / top if top else 0.0, "start"),),
    )


def _how_good(run: Run, sets: Sequence[DataSet]) -> LargeNumber | None:
    for data in sets:
        score = headline(data)
        if score is None:
            continue
        model = data.of_run(run)
        own = model and model.evaluation.scores.get(score)
        if not own or not own.interval_95:
            continue
        low, high = own.interval_95
        others = {
            (m.label, m.role): m.evaluation.scores[score].mean
            for m in data.beside
            if score in m.evaluation.scores
        }
        top = 1.1 * max([high, *others.values(), 1e-9])
        marks = [Mark(label, 100 * mean / top, role) for (label, role), mean in others.items()]
        marks.append(Mark("student", 100 * own.mean / top, "run"))
        known = [f"{label} {mean:.1f}" for (label, _), mean in others.items()]
        detail = f"95% interval {plain(low)} to {plain(high)}"
        return LargeNumber(
            label=score_name(score).removesuffix(", %"),
            value=f"{own.mean:.1f}",
            unit=f"percent on {data.name}",
            detail="; ".join([detail, *known]),
            fill=0.0,
            band=(100 * low / top, 100 * high / top),
            marks=tuple(marks),
        )
    return None


def _weights(run: Run, found: Savings | None) -> list[LargeNumber]:
    """Size, speed and memory; a run that was never evaluated knows its size alone."""
    if found is None:
        summary, share = run.summary or {}, size_share(run)
        parameters = summary.get("student_parameters")
        teacher = summary.get("teacher_parameters")
        return [_size(parameters, share, teacher)] if parameters else []
    own, other = found.student, found.teacher or {}
    faster, lighter = found.share("tokens_per_second"), found.share("bytes_memory")
    on_disk = f"{size(own['bytes_disk'])} on disk"
    return [
        _size(own["parameters"], found.share("parameters"), other.get("parameters")),
        LargeNumber(
            label="Speed of generation",
            value=count(own["tokens_per_second"]),
            unit="tokens per second",
            detail=f"{own['engine']}: {faster:.2f} times the teacher's "
            f"{count(other['tokens_per_second'])}; {found.with_vllm}"
            if faster
            else f"{found.unsteady or found.how}; {found.with_vllm}",
            fill=None if not faster else 100.0 * min(1.0, faster),
            marks=() if not faster else (Mark("teacher", 100 / max(1.0, faster), "teacher"),),
        ),
        LargeNumber(
            label="Memory of the weights",
            value=size(own["bytes_memory"]).partition(" ")[0],
            unit=size(own["bytes_memory"]).partition(" ")[2],
            detail=f"{100 * lighter:.0f}% of the teacher's {size(other['bytes_memory'])}; "
            f"{on_disk}, the teacher {size(other['bytes_disk'])}"
            if lighter
            else on_disk,
            fill=100 * lighter if lighter and lighter <= 1 else None,
        ),
    ]


def _size(parameters: int, share: float | None, teacher: Any) -> LargeNumber:
    value, _, unit = count(parameters).partition(" ")
    return LargeNumber(
        label="Size",
        value=value,
        unit=UNITS.get(unit, "parameters"),
        detail=f"{100 * share:.0f}% of the teacher's {count(teacher)}"
        if share
        else "no teacher to compare with",
        fill=100 * share if share and share <= 1 else None,
    )


def _took(run: Run) -> list[LargeNumber]:
    took = cost(run)
    seconds = took.seconds_generation + took.seconds_learning if took else 0.0
    if not took or not seconds:
        return []
    share = 100 * took.seconds_generation / seconds
    value, unit = _time(seconds)
    detail = f"{took.steps:,} steps, {share:.0f}% of their time generating responses"
    return [LargeNumber("What training cost", value, unit, detail=detail)]


def _took_path(subject: Subject) -> list[LargeNumber]:
    value, unit = _time(sum(subject.seconds.values()))
    stages = sorted(subject.seconds.items(), key=lambda item: -item[1])[:3]
    detail = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages)
    return [LargeNumber("What it cost", value, unit, detail=f"all stages; {detail}")]


def _took_study(subject: Subject) -> list[LargeNumber]:
    found = [c for run in subject.runs if (c := cost(run))]
    if not found:
        return []
    value, unit = _time(sum(c.seconds_generation + c.seconds_learning for c in found))
    number = len(found)
    return [LargeNumber("What training cost", value, unit, detail=f"the steps of {number} runs")]


def _time(seconds: float) -> tuple[str, str]:
    for least, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= least:
            return f"{seconds / least:.1f}", unit
    return f"{seconds:.1f}", "seconds"
