"""What a report claims, as pure functions over what runs left behind.

Every claim is about one data set, which it names, and gives the teacher's value where it was
measured there. A difference is called one only where its paired bootstrap interval excludes zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.numbers import digits, like, plain
from promptkd.report.comparisons import (
    between,
    comparison_words,
    describe,
    headline,
    in_words,
    mean,
    power_words,
    ranking,
    score_name,
)
from promptkd.report.data import DataSet, Run
from promptkd.report.savings import savings

ENDED_LESS = 20  # percentage points that are worth a warning
VALIDATION = "the validation data (one response per request, no interval)"


@dataclass(frozen=True)
class Distance:
    """KL(student || teacher) in nats per token, at the start and for the student that was kept.

    Attributes:
        where: on which data.
        interval: of ``end``, 95 %.
    """

    start: float
    end: float
    where: str
    interval: tuple[float, float] | None = None

    @property
    def closer(self) -> float:
        """Percent of the starting distance that is gone; negative if it grew."""
        return 100 * (1 - self.end / self.start) if self.start else 0.0


def distance(run: Run, sets: Sequence[DataSet]) -> Distance | None:
    """From evaluations of the run and its start if both exist, else from the validations."""
    for data in sets:
        own, start = data.of_run(run), data.of_role("start")
        if own and len(start) == 1:
            values = [mean(m, "reverse_kl_to_teacher") for m in (start[0], own)]
            if None not in values:
                interval = own.evaluation.scores["reverse_kl_to_teacher"].interval_95
                return Distance(*values, where=describe(data), interval=interval)
    change = validation_change(run, "reverse_kl_to_teacher")
    if change is None:
        return None
    return Distance(*change, where=VALIDATION)


def validation_change(run: Run, score: str) -> tuple[float, float] | None:
    """A score at the first validation and at that of the kept step; None if not both exist."""
    measured = {
        row["step"]: row["evaluation"][score]
        for row in run.validations
        if row["evaluation"].get(score) is not None
    }
    if len(measured) < 2:
        return None
    kept = run.kept_step if run.kept_step in measured else max(measured)
    return measured[min(measured)], measured[kept]


def warnings(run: Run, sets: Sequence[DataSet]) -> list[str]:
    """What a closer student may hide: it ends less often, or its responses changed length.

    Where its teacher answered the same requests and does the same, it learnt what it was taught.
    """
    for data in sets:
        own = data.of_run(run)
        start, teacher = (next(iter(data.of_role(role)), None) for role in ("start", "teacher"))
        if own and start:
            models = [(m.evaluation if m else None) for m in (start, own, teacher)]
            where = f"on {describe(data)}"
            ended, length = (
                [e.mean(score) if e else None for e in models]
                for score in ("ended", "response_length")
            )
            return _warnings_of(ended, length, where)
    ended, length = (
        [*(validation_change(run, score) or (None, None)), None]
        for score in ("ended", "response_length")
    )
    return _warnings_of(ended, length, f"on {VALIDATION}")


def _warnings_of(
    ended: Sequence[float | None], length: Sequence[float | None], where: str
) -> list[str]:
    """Of (start, student, teacher) each; None is not measured."""
    found = []
    for words, (before, now, teacher) in ((_ended_less, ended), (_other_length, length)):
        said = None if before is None or now is None else words(before, now, teacher)
        if said:
            found.append(f"{where}, {said}")
    return found


def _ended_less(before: float, now: float, teacher: float | None) -> str | None:
    if before - now < ENDED_LESS or (teacher is not None and teacher - now < ENDED_LESS):
        return None
    known = "not measured there" if teacher is None else f"{teacher:.0f}%"
    shares = f"{before:.0f}% before, {now:.0f}% now; its teacher's: {known}"
    return f"fewer of its responses end by themselves ({shares})"


def _other_length(before: float, now: float, teacher: float | None) -> str | None:
    if any(other is not None and other < 2 * now < 4 * other for other in (before, teacher)):
        return None
    known = "not measured there" if teacher is None else f"{teacher:.0f}"
    tokens = f"{before:.0f} to {now:.0f} tokens (its teacher's: {known})"
    return f"its responses went from {tokens}"


def size_share(run: Run) -> float | None:
    """Student parameters over teacher parameters."""
    summary = run.summary or {}
    student, teacher = summary.get("student_parameters"), summary.get("teacher_parameters")
    return student / teacher if student and teacher else None


def leading_run(runs: Sequence[Run], sets: Sequence[DataSet]) -> Run:
    """The run whose numbers open the page: best on the first data set, else closest."""
    for data in sets:
        score = headline(data)
        scored = {m.label: mean(m, score) for m in data.of_role("run") if score}
        candidates = [r for r in runs if scored.get(r.label) is not None]
        if candidates:
            return max(candidates, key=lambda run: scored[run.label])
    distances = {run.label: distance(run, sets) for run in runs}
    return min(runs, key=lambda run: d.end if (d := distances[run.label]) else float("inf"))


def answer(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    """What came of it, in a few sentences of one data set each."""
    if len(runs) == 1:
        run = runs[0]
        warned = [f"But {warning}." for warning in warnings(run, sets)]
        return [*_score_sentences(run, sets), _closeness(run, sets), *warned, *_savings(run, sets)]
    for data in sets:
        found = ranking(data)
        if found:
            return [*found, _closest(runs, sets)]
    return [
        _closest(runs, sets),
        "Nothing yet tells the scores of the runs apart: evaluate them on the same requests with "
        "the same seeds.",
    ]


def _score_sentences(run: Run, sets: Sequence[DataSet]) -> list[str]:
    """The score with its interval, the others' beside it, and the paired differences."""
    for data in sets:
        own, score = data.of_run(run), headline(data)
        if own is None or score is None or mean(own, score) is None:
            continue
        interval = own.evaluation.scores[score].interval_95
        shown = f" (95% interval {plain(interval[0])} to {plain(interval[1])})" if interval else ""
        others = [model for model in data.beside if mean(model, score) is not None]
        unit = "%" * score_name(score).endswith("%")
        beside = ", ".join(f"its {m.label}'s {plain(mean(m, score))}{unit}" for m in others)
        head = f"On {describe(data)}, the student's {in_words(score, mean(own, score))}"
        number = own.evaluation.num_examples
        against = [
            f"Against its {model.label}: {comparison_words(c)}{power_words([c], number)}."
            for model in others
            if (c := between(own, model, score))
        ]
        return [f"{head}{shown}" + (f"; {beside}." if beside else "."), " ".join(against)][
            : 1 + bool(against)
        ]
    change = validation_change(run, "rouge_l")
    if change is None:
        return []
    return [f"On {VALIDATION} its ROUGE-L went from {change[0]:.1f} to {change[1]:.1f}."]


def _closeness(run: Run, sets: Sequence[DataSet]) -> str:
    found = distance(run, sets)
    if found is None:
        state = "was trained" if run.summary else "is being trained"
        return f"The student {state} with {run.method}; its distance to a teacher is unknown."
    end = digits(found.end)
    ends = " to ".join(like(end, value) for value in found.interval or ())
    interval = f", 95% interval {ends}" if ends else ""
    values = f"KL from {digits(found.start)} to {end} nats per token{interval}"
    head = f"On {found.where}, the student"
    if found.closer >= 0.5:
        return f"{head} came {_percent(found.closer)} closer to its teacher ({values})."
    if found.closer <= -0.5:
        return f"{head} moved away from its teacher ({values})."
    return f"{head} is as far from its teacher as it was ({values})."


def _percent(value: float) -> str:
    """Never 100 where something is left."""
    return f"{value:.0f}%" if value <= 99.5 or value == 100 else f"{min(value, 99.9):.1f}%"


def _savings(run: Run, sets: Sequence[DataSet]) -> list[str]:
    """Size, speed, memory and disk against the teacher's, as far as they were measured."""
    found = savings(run, sets)
    if found is None or found.teacher is None:
        share = size_share(run)
        return [f"It has {100 * share:.0f}% of its teacher's parameters."] if share else []
    keys = ("parameters", "bytes_memory", "bytes_disk")
    parameters, memory, disk = (f"{100 * (found.share(key) or 0.0):.0f}%" for key in keys)
    weights = f"and its weights take {memory} of the memory and {disk} of the disk."
    faster, engine = found.share("tokens_per_second"), found.student["engine"]
    if faster is None:
        unsteady = f"Its speed is {found.unsteady}."
        return [f"It has {parameters} of its teacher's parameters, {weights} {unsteady}"]
    speed = f"generates {faster:.2f} times as fast with {engine} ({found.with_vllm}),"
    return [f"It has {parameters} of its teacher's parameters, {speed} {weights}"]


def _closest(runs: Sequence[Run], sets: Sequence[DataSet]) -> str:
    found = {run.label: d for run in runs if (d := distance(run, sets))}
    if not found:
        return "How far the students are from their teacher is unknown."
    label = min(found, key=lambda name: found[name].end)
    own = found[label]
    return (
        f"Closest to its teacher ends {label}: on {own.where}, {digits(own.end)} nats per token "
        f"(its start: {digits(own.start)})."
    )
