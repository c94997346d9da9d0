"""What a report claims, as pure functions: comparisons, the answer, the large numbers, tables.

A difference is called one only where the paired bootstrap interval over requests excludes zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promptkd.evaluation.comparison import difference
from promptkd.evaluation.results import Evaluation
from promptkd.report.data import DataSet, Model, Run

RANKED = ("rouge_l", "exact_match")  # per request, and more is better
ENDED_LESS = 20  # percentage points that are worth a warning
SCORE_NAMES = {
    "rouge_l": "ROUGE-L",
    "exact_match": "Exact match, %",
    "reverse_kl_to_teacher": "KL to teacher, nats/token",
    "cross_entropy": "Cross-entropy, nats/token",
    "response_length": "Length, tokens",
    "ended": "Ended by itself, %",
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
    """KL(student || teacher) in nats per token, at the start and for the student that was kept."""

    start: float
    end: float
    where: str

    @property
    def closer(self) -> float:
        """Percent of the starting distance that is gone; negative if it grew."""
        return 100 * (1 - self.end / self.start) if self.start else 0.0


@dataclass(frozen=True)
class TrainingCost:
    """What training took, over the logged steps."""

    steps: int
    tokens: int
    seconds_writing: float
    seconds_learning: float
    seconds_teacher: float
    seconds_student: float
    seconds_losses: float
    flops: float
    peak_memory: int

    @property
    def tokens_per_second(self) -> float:
        seconds = self.seconds_writing + self.seconds_learning
        return self.tokens / seconds if seconds else 0.0

    @property
    def seconds_rest(self) -> float:
        """Of learning: optimizers, and all of it in runs that didn't write down its parts."""
        return self.seconds_learning - (
            self.seconds_teacher + self.seconds_student + self.seconds_losses
        )

    @property
    def flop_rate(self) -> float:
        return self.flops / self.seconds_learning if self.seconds_learning else 0.0


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


def distance(run: Run, sets: Sequence[DataSet]) -> Distance | None:
    """From evaluations of the run and its start if both exist, else from the validations."""
    for data in sets:
        own = [m for m in data.of_role("run") if m.label == run.label]
        start = data.of_role("start")
        if own and len(start) == 1:
            values = [_mean(m, "reverse_kl_to_teacher") for m in (start[0], own[0])]
            if None not in values:
                return Distance(values[0], values[1], f"on {describe(data)}")
    change = validation_change(run, "reverse_kl_to_teacher")
    if change is None:
        return None
    return Distance(*change, "on the validation data, one response per request, no interval")


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


def warnings(run: Run) -> list[str]:
    """What a closer student may hide: it doesn't end any more, or its responses changed length."""
    found = []
    ended = validation_change(run, "ended")
    if ended and ended[0] - ended[1] >= ENDED_LESS:
        shares = f"{ended[0]:.0f}% before, {ended[1]:.0f}% now"
        found.append(f"fewer of its responses end by themselves ({shares})")
    length = validation_change(run, "response_length")
    if length and length[0] and length[1] and not 0.5 < length[1] / length[0] < 2:
        found.append(f"its responses went from {length[0]:.0f} to {length[1]:.0f} tokens")
    return found


def cost(run: Run) -> TrainingCost | None:
    """Sums over the logged steps; None if there are none."""
    if not run.steps:
        return None
    summed = ("writing", "learning", "teacher", "student", "losses")
    seconds = {
        f"seconds_{part}": sum(row.get(f"seconds_{part}", 0.0) for row in run.steps)
        for part in summed
    }
    return TrainingCost(
        steps=len(run.steps),
        tokens=int(sum(row.get("num_tokens", 0) for row in run.steps)),
        **seconds,
        flops=sum(row.get("flops", 0.0) for row in run.steps),
        peak_memory=max(row.get("peak_memory", 0) for row in run.steps),
    )


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
    """The run whose numbers open the page: highest ROUGE-L on the first data set, else closest."""
    for data in sets:
        scored = {m.label: _mean(m, "rouge_l") for m in data.of_role("run")}
        candidates = [r for r in runs if scored.get(r.label) is not None]
        if candidates:
            return max(candidates, key=lambda run: scored[run.label])
    distances = {run.label: distance(run, sets) for run in runs}
    return min(runs, key=lambda run: d.end if (d := distances[run.label]) else float("inf"))


def answer(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    """What came of it, in one to three sentences."""
    if len(runs) == 1:
        head = _closeness(runs[0], sets)
        warned = warnings(runs[0])
        if warned:
            head = f"{head[:-1]}, but {_listed(warned)}."
        return [head, *_score_sentences(runs[0], sets)]
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
    values = f"from {digits(found.start)} to {digits(found.end)} nats per token"
    if found.closer >= 0.5:
        return f"The student came {found.closer:.0f}% closer to its teacher ({values}){size}."
    if found.closer <= -0.5:
        return f"The student moved away from its teacher ({values}){size}."
    return f"The student is as far from its teacher as it was ({values}){size}."


def _score_sentences(run: Run, sets: Sequence[DataSet]) -> list[str]:
    for data in sets:
        own = next((m for m in data.of_role("run") if m.label == run.label), None)
        if own is None or _mean(own, "rouge_l") is None:
            continue
        interval = own.evaluation.scores["rouge_l"].interval_95
        shown = f" (95% interval {plain(interval[0])} to {plain(interval[1])})" if interval else ""
        sentence = f"On {describe(data)} it scores ROUGE-L {_mean(own, 'rouge_l'):.1f}{shown}"
        against = [
            f"against its {model.label}: {comparison_words(found)}"
            for role in ("start", "teacher")
            for model in data.of_role(role)
            if (found := between(own, model, "rouge_l"))
        ]
        return ["; ".join([sentence, *against]) + "."]
    change = validation_change(run, "rouge_l")
    if change is None:
        return []
    return [
        f"On the validation data its ROUGE-L went from {change[0]:.1f} to {change[1]:.1f}, "
        "measured once and without an interval."
    ]


def _ranking(runs: Sequence[Run], sets: Sequence[DataSet]) -> list[str]:
    for data in sets:
        models = [m for m in data.of_role("run") if _mean(m, "rouge_l") is not None]
        if len(models) < 2:
            continue
        models.sort(key=lambda model: -_mean(model, "rouge_l"))
        leader, others = models[0], models[1:]
        found = [c for other in others if (c := between(leader, other, "rouge_l"))]
        where = f"on {describe(data)}"
        tied = [c.second for c in found if not c.shown]
        if len(tied) == len(others):
            head = f"No difference shown between {_listed([m.label for m in models])}."
        elif tied:
            head = (
                f"{leader.label} scores highest of {len(models)} runs, with no difference shown to "
                f"{_listed(tied)}."
            )
        else:
            head = f"{leader.label} scores best of {len(models)} runs."
        gaps = "; ".join(f"against {c.second} {comparison_words(c)}" for c in found)
        return [head, f"ROUGE-L {_mean(leader, 'rouge_l'):.1f} for {leader.label} {where}: {gaps}."]
    return []


def _closest(runs: Sequence[Run], sets: Sequence[DataSet]) -> str:
    found = {run.label: d for run in runs if (d := distance(run, sets))}
    if not found:
        return "How far the students are from their teacher is unknown."
    label = min(found, key=lambda name: found[name].end)
    return (
        f"Closest to its teacher ends {label}, at {digits(found[label].end)} nats per token "
        f"(its start: {digits(found[label].start)})."
    )


def _mean(model: Model, score: str) -> Any:
    return model.evaluation.mean(score)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def digits(value: float) -> str:
    """Three significant digits, never an exponent.

    >>> digits(0.0000123456), digits(1.2), digits(-12345.6)
    ('0.0000123', '1.20', '−12346')
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", "−")


def plain(value: float) -> str:
    """One decimal, with a minus sign."""
    return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def signed(value: float) -> str:
    """One decimal, always with its sign.

    >>> signed(1.25), signed(-0.31), signed(0.0)
    ('+1.2', '−0.3', '±0.0')
    """
    text = f"{value:+.1f}"
    return "±0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def count(number: float) -> str:
    """A large number for people: 31,456 or 134.5 M.

    >>> count(31456), count(134_515_008), count(1_310_000_000)
    ('31,456', '134.5 M', '1.31 B')
    """
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    if number >= 1e6:
        return f"{number / 1e6:.1f} M"
    return f"{number:,.0f}"
