"""Which models differ in which score, and how sure that is, as numbers and in words."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from promptkd.evaluation.comparison import difference
from promptkd.evaluation.results import Evaluation
from promptkd.numbers import digits, plain, signed
from promptkd.report.data import DataSet, Model

RANKED = ("rouge_l", "rouge_l_unicode", "exact_match", "final_answer")
"""More is better; the first that covers the most requests compares models in words."""
EXACT = 20.0
"""Percent of exact matches from which on they compare models: the task has one right answer."""
SCORE_NAMES = {
    "rouge_l": "ROUGE-L",
    "rouge_l_unicode": "ROUGE-L (Unicode words)",
    "exact_match": "Exact match, %",
    "final_answer": "Final answer, %",
    "reverse_kl_to_teacher": "KL to teacher, nats/token",
    "reverse_kl_without_context": "KL to teacher without its context, nats/token",
    "cross_entropy": "Cross-entropy, nats/token",
    "teacher_cross_entropy": "Cross-entropy under the teacher, nats/token",
    "response_length": "Length, tokens",
    "ended": "Ended by itself, %",
    "repeated_4_grams": "Repeated 4-grams, %",
}
NATS = (
    "reverse_kl_to_teacher",
    "reverse_kl_without_context",
    "cross_entropy",
    "teacher_cross_entropy",
)
"""Scores in nats per token: less is better, and the first decimal says nothing."""
STANDARD_ERRORS = 2 * 1.96
"""Widths of a 95% interval."""
DETECTED = 1.96 + 0.84
"""Standard errors away from zero, a difference is shown by four samples of requests in five."""


@dataclass(frozen=True)
class Comparison:
    """The mean of first - second over the same requests, with its 95% interval.

    It is about these very models: what other training seeds would change, only a study knows.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the data show a difference: the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def detectable(self) -> float:
        """The difference that as many requests would show four times in five."""
        return DETECTED * (self.high - self.low) / STANDARD_ERRORS


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
    """The label that may be marked best: better than every other one, each difference shown.

    None for fewer than two models, or where no difference is shown.
    """
    if len(models) < 2:
        return None
    leader = max(models, key=lambda model: mean(model, score))
    comparisons = [between(leader, other, score) for other in models if other is not leader]
    if all(c is not None and c.shown and c.difference > 0 for c in comparisons):
        return leader.label
    return None


def mean(model: Model, score: str) -> Any:
    return model.evaluation.mean(score)


def headline(data: DataSet) -> str | None:
    """The score that compares models in words: a study's own, where it names one.

    Else exact match where some model reaches ``EXACT``, else ROUGE-L unless another covers more
    requests.
    """
    if data.compared:
        return data.compared
    scores = (data.of_role("run") or data.models)[0].evaluation.scores
    known = [name for name in RANKED if name in scores]
    if "exact_match" in known and max(mean(m, "exact_match") or 0 for m in data.models) >= EXACT:
        return "exact_match"
    return max(known, key=lambda name: scores[name].num_requests or 0, default=None)


def score_name(score: str) -> str:
    """As headings call it; a user's own metric by its own name."""
    return SCORE_NAMES.get(score, score)


def number_of(score: str) -> Callable[[float], str]:
    """What writes a value of this score: one decimal, or in nats three digits."""
    return digits if score in NATS else plain


def in_words(score: str, value: float) -> str:
    """A score with its unit: ``exact match is 58.3%`` or ``ROUGE-L is 21.7``."""
    name, _, unit = score_name(score).partition(", ")
    if score in NATS:
        return f"{name} is {digits(value)} nats per token"
    return f"{name.lower() if unit else name} is {plain(value)}{unit}"


def shown_scores(data: DataSet) -> list[str]:
    """Every score that a model of the data set has, ours first."""
    return in_order({name for model in data.models for name in model.evaluation.scores})


def in_order(found: Set[str]) -> list[str]:
    """Names of scores as tables show them, ours first."""
    return [*(n for n in SCORE_NAMES if n in found), *sorted(found - SCORE_NAMES.keys())]


def describe(data: DataSet) -> str:
    """``dolly_valid (200 requests, seeds 10 and 20)``; greedy decoding has no seeds."""
    evaluation = data.evaluation
    number = evaluation.num_examples
    requests = f"{number} request{'s' if number != 1 else ''}"
    if is_greedy(evaluation):
        return f"{data.name} ({requests}, greedy)"
    seeds = evaluation.seeds
    return f"{data.name} ({requests}, seed{'s' * (len(seeds) > 1)} {listed([*map(str, seeds)])})"


def is_greedy(evaluation: Evaluation) -> bool:
    return evaluation.decoding.get("temperature") == 0


def decoding_words(evaluation: Evaluation) -> str:
    """How the responses were generated, in words."""
    decoding = evaluation.decoding
    temperature = decoding.get("temperature", 1.0)
    parts = ["greedy decoding"] if is_greedy(evaluation) else [f"temperature {temperature:g}"]
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


def comparison_words(c: Comparison) -> str:
    """``2.1 points more, 95% interval 0.9 to 3.3``, or ``no difference shown (+0.1, ...)``."""
    if not c.shown:
        return (
            f"no difference shown ({signed(c.difference)}, 95% interval "
            f"{plain(c.low)} to {plain(c.high)})"
        )
    word = "more" if c.difference > 0 else "less"
    low, high = sorted((abs(c.low), abs(c.high)))
    return f"{abs(c.difference):.1f} points {word}, 95% interval {low:.1f} to {high:.1f}"


def power_words(comparisons: Sequence[Comparison], num_requests: int) -> str:
    """What as many requests would have shown of each; nothing where all differences are shown."""
    detectable = max((c.detectable for c in comparisons if not c.shown), default=0.0)
    if detectable < 0.05:
        return ""
    return (
        f"; with {num_requests} requests, a true difference of {plain(detectable)} points or more "
        "would show four times in five"
    )


def ranking(data: DataSet) -> list[str]:
    """Who is ahead among runs."""
    score = headline(data)
    models = [m for m in data.of_role("run") if score and mean(m, score) is not None]
    if score is None or len(models) < 2:
        return []
    models.sort(key=lambda model: -mean(model, score))
    leader, others = models[0], models[1:]
    found = [c for other in others if (c := between(leader, other, score))]
    where = f"on {describe(data)}"
    tied = [c.second for c in found if not c.shown]
    if len(tied) == len(others):
        head = f"No difference shown between {listed([m.label for m in models])}"
    elif tied:
        head = (
            f"{leader.label} scores highest of {len(models)} runs, with no difference shown to "
            f"{listed(tied)}"
        )
    else:
        head = f"{leader.label} scores best of {len(models)} runs"
    gaps = "; ".join(f"against {c.second} {comparison_words(c)}" for c in found)
    teachers = [f" (the teacher: {plain(mean(m, score))})" for m in data.of_role("teacher")]
    value = f"{leader.label}'s {in_words(score, mean(leader, score))}"
    known = power_words(found, data.evaluation.num_examples)
    return [f"{head} {where}.", f"{value}{''.join(teachers[:1])}; {gaps}{known}."]


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
