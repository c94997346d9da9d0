"""What a report claims, as pure functions over what runs left behind.

Every claim is about one data set, which it names, and gives the teacher's value where it was
measured there. A difference is called one only where its paired bootstrap interval excludes zero.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from promptkd.evaluation.comparison import difference
from promptkd.evaluation.results import Evaluation
from promptkd.report.data import DataSet, Model, Run
from promptkd.report.numbers import digits, plain, signed

RANKED = ("rouge_l", "rouge_l_unicode", "exact_match", "final_answer")
"""More is better; the first that covers the most requests compares models in words."""
ENDED_LESS = 20  # percentage points that are worth a warning
VALIDATION = "the validation data (one response per request, no interval)"
SCORE_NAMES = {
    "rouge_l": "ROUGE-L",
    "rouge_l_unicode": "ROUGE-L (Unicode words)",
    "exact_match": "Exact match, %",
    "final_answer": "Final answer, %",
    "reverse_kl_to_teacher": "KL to teacher, nats/token",
    "cross_entropy": "Cross-entropy, nats/token",
    "teacher_cross_entropy": "Cross-entropy under teacher, nats/token",
    "response_length": "Length, tokens",
    "ended": "Ended by itself, %",
    "repeated_4_grams": "Repeated 4-grams, %",
}


@dataclass(frozen=True)
class Comparison:
    """The mean of first - second over the same requests, with its 95% interval."""

    first: str
    second: str
    difference: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the data show a difference: the interval excludes zero."""
        return self.low > 0 or self.high < 0


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


def between(first: Model, second: Model, score: str) -> Comparison | None:
    """Paired bootstrap over requests; None if a score is missing or the requests differ."""
    found = difference(first.evaluation, second.evaluation, score)
    if found is None:
        return None
    return Comparison(
        first=first.label,
        second=second.label,
        difference=found.difference,
        low=found.low,
        high=found.high,
    )


def best_model(models: Sequence[Model], score: str) -> str | None:
    """The label that may be marked best: better than every other one, each interval clear of zero.

    None for fewer than two models, or where no difference is shown.
    """
    if len(models) < 2:
        return None
    leader = max(models, key=lambda model: _mean(model, score))
    comparisons = [between(leader, other, score) for other in models if other is not leader]
    if all(c is not None and c.low > 0 for c in comparisons):
        return leader.label
    return None


def headline(data: DataSet) -> str | None:
    """The score that compares models in words: ROUGE-L unless another covers more requests."""
    scores = (data.of_role("run") or data.models)[0].evaluation.scores
    known = [name for name in RANKED if name in scores]
    return max(known, key=lambda name: scores[name].num_requests or 0, default=None)


def score_name(score: str) -> str:
    """As headings call it; a user's own metric by its own name."""
    return SCORE_NAMES.get(score, score)


def shown_scores(data: DataSet) -> list[str]:
    """Every score that a model of the data set has, ours first."""
    return in_order({name for model in data.models for name in model.evaluation.scores})


def in_order(found: Set[str]) -> list[str]:
    """Names of scores as tables show them, ours first."""
    return [*(n for n in SCORE_NAMES if n in found), *sorted(found - SCORE_NAMES.keys())]


def distance(run: Run, sets: Sequence[DataSet]) -> Distance | None:
    """From evaluations of the run and its start if both exist, else from the validations."""
    for data in sets:
        own, start = data.of_run(run), data.of_role("start")
        if own and len(start) == 1:
            values = [_mean(m, "reverse_kl_to_teacher") for m in (start[0], own)]
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


def describe(data: DataSet) -> str:
    """``dolly_valid (200 requests, seeds 10 and 20)``."""
    evaluation = data.evaluation
    seeds = [str(seed) for seed in evaluation.seeds]
    named = " and ".join([", ".join(seeds[:-1]), seeds[-1]] if len(seeds) > 1 else seeds)
    number = evaluation.num_examples
    requests = f"{number} request{'s' if number != 1 else ''}"
    return f"{data.name} ({requests}, seed{'s' if len(seeds) > 1 else ''} {named})"


def decoding_words(evaluation: Evaluation) -> str:
    """How the responses were generated, in words."""
    decoding = evaluation.decoding
    temperature = decoding.get("temperature", 1.0)
    parts = ["greedy decoding"] if temperature == 0 else [f"temperature {temperature:g}"]
    if decoding.get("top_p", 1.0) < 1:
        parts.append(f"top-p {decoding['top_p']:g}")
    if decoding.get("top_k", 0):
        parts.append(f"top-k {decoding['top_k']}")
    blocked = decoding.get("no_repeat_ngram_size", 0)
    parts.append(f"no repeated {blocked}-grams" if blocked else "no n-gram blocking")
    parts.append(f"at most {decoding.get('max_new_tokens', '?')} tokens")
    parts.append(f"template {evaluation.template}")
    if evaluation.num_cut_requests:
        parts.append(f"{evaluation.num_cut_requests} requests cut")
    return ", ".join(parts)


def leading_run(runs: Sequence[Run], sets: Sequence[DataSet]) -> Run:
    """The run whose numbers open the page: best on the first data set, else closest."""
    for data in sets:
        score = headline(data)
        scored = {m.label: _mean(m, score) for m in data.of_role("run") if score}
        candidates = [r for r in runs if scored.get(r.label) is not None]
        if candidates:
            return max(candidates, key=lambda run: scored[run.label])
    distances = {run.label: distance(run, sets) for run in runs}
    return min(runs, key=lambda run: d.end if (d := distances[run.label]) else float("inf"))


def answer(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    """What came of it, in a few sentences of one data set each."""
    if len(runs) == 1:
        warned = [f"But {warning}." for warning in warnings(runs[0], sets)]
        return [_closeness(runs[0], sets), *warned, *_score_sentences(runs[0], sets)]
    ranking = _ranking(runs, sets)
    if ranking:
        return [*ranking, _closest(runs, sets)]
    return [
        _closest(runs, sets),
        "Nothing yet tells the scores of the runs apart: evaluate them on the same requests with "
        "the same seeds.",
    ]


def comparison_words(c: Comparison) -> str:
    """``2.1 more, 95% interval 0.9 to 3.3`` or ``no difference shown (+0.1, 95% -0.4 to 0.6)``."""
    if not c.shown:
        return (
            f"no difference shown ({signed(c.difference)}, 95% interval "
            f"{plain(c.low)} to {plain(c.high)})"
        )
    word = "more" if c.difference > 0 else "less"
    low, high = sorted((abs(c.low), abs(c.high)))
    return f"{abs(c.difference):.1f} {word}, 95% interval {low:.1f} to {high:.1f}"


def _closeness(run: Run, sets: Sequence[DataSet]) -> str:
    found = distance(run, sets)
    share = size_share(run)
    size = f", at {100 * share:.0f}% of its size" if share else ""
    if found is None:
        state = "was trained" if run.summary else "is being trained"
        return f"The student {state} with {run.method}{size}; its distance to a teacher is unknown."
    interval = f", 95% interval {_between(found.interval)}" if found.interval else ""
    values = f"from {digits(found.start)} to {digits(found.end)} nats per token{interval}"
    head = f"On {found.where}, the student"
    if found.closer >= 0.5:
        return f"{head} came {found.closer:.0f}% closer to its teacher ({values}){size}."
    if found.closer <= -0.5:
        return f"{head} moved away from its teacher ({values}){size}."
    return f"{head} is as far from its teacher as it was ({values}){size}."


def _between(interval: tuple[float, float]) -> str:
    return f"{digits(interval[0])} to {digits(interval[1])}"


def _score_sentences(run: Run, sets: Sequence[DataSet]) -> list[str]:
    for data in sets:
        own, score = data.of_run(run), headline(data)
        if own is None or score is None or _mean(own, score) is None:
            continue
        interval = own.evaluation.scores[score].interval_95
        shown = f" (95% interval {plain(interval[0])} to {plain(interval[1])})" if interval else ""
        value = f"{score_name(score)} {_mean(own, score):.1f}{shown}"
        against = [
            f"against its {model.label} ({plain(_mean(model, score))}): {comparison_words(found)}"
            for role in ("start", "teacher")
            for model in data.of_role(role)
            if (found := between(own, model, score))
        ]
        return ["; ".join([f"On {describe(data)} it scores {value}", *against]) + "."]
    change = validation_change(run, "rouge_l")
    if change is None:
        return []
    return [f"On {VALIDATION} its ROUGE-L went from {change[0]:.1f} to {change[1]:.1f}."]


def _ranking(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    for data in sets:
        score = headline(data)
        models = [m for m in data.of_role("run") if score and _mean(m, score) is not None]
        if score is None or len(models) < 2:
            continue
        models.sort(key=lambda model: -_mean(model, score))
        leader, others = models[0], models[1:]
        found = [c for other in others if (c := between(leader, other, score))]
        where = f"on {describe(data)}"
        tied = [c.second for c in found if not c.shown]
        if len(tied) == len(others):
            head = f"No difference shown between {_listed([m.label for m in models])}"
        elif tied:
            head = (
                f"{leader.label} scores highest of {len(models)} runs, with no difference shown to "
                f"{_listed(tied)}"
            )
        else:
            head = f"{leader.label} scores best of {len(models)} runs"
        gaps = "; ".join(f"against {c.second} {comparison_words(c)}" for c in found)
        teachers = [f" (the teacher: {plain(_mean(m, score))})" for m in data.of_role("teacher")]
        value = f"{score_name(score)} {_mean(leader, score):.1f} for {leader.label}"
        return [f"{head} {where}.", f"{value}{''.join(teachers[:1])}: {gaps}."]
    return []


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


def _mean(model: Model, score: str) -> Any:
    return model.evaluation.mean(score)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
