"""The judge's two protocols: instructions, parsing of replies, and summaries of verdicts.

``score``: 100 * sum of the model's grades / sum of the references' grades, from 1 to 10 each, the
model always shown first. ``pairwise``: every pair is shown in both orders; a win or a loss counts
only if both orders agree, everything else is a tie; win rate = wins + ties / 2. Pure functions.

Source: PromptKD, arXiv:2402.12842, Appendix C, Table 6 (``score``; the wording is our own).
"""

import re
from collections import Counter
from typing import Any

import numpy as np

from promptkd.evaluation.statistics import (
    TAILS,
    bootstrap_interval,
    mean_and_deviation,
    resampled_counts,
)

Pair = tuple[int, int]
"""(decoding seed, row of the data)."""

SCORE_INSTRUCTION = """\
You grade two replies to the same request.

<request>
{request}
</request>

<reply of assistant 1>
{first}
</reply of assistant 1>

<reply of assistant 2>
{second}
</reply of assistant 2>

Judge for each reply whether it does what the request asks, whether what it says is true, whether \
something important is missing or superfluous, and whether it reads well. Which reply comes first, \
and which is longer, must not matter. Grade each reply from 1 (useless) to 10 (nothing to improve).

On the first line, write only the two grades as numbers, assistant 1 before assistant 2, with one \
space between them. From the second line on, explain them in at most three sentences."""

PAIRWISE_INSTRUCTION = """\
You decide which of two replies serves the same request better.

<request>
{request}
</request>

<first reply>
{first}
</first reply>

<second reply>
{second}
</second reply>

Judge for each reply whether it does what the request asks, whether what it says is true, whether \
something important is missing or superfluous, and whether it reads well. Which reply comes first, \
and which is longer, must not matter.

On the first line, write a single word: "first" or "second" for the better reply, or "tie" if \
neither is better. From the second line on, explain it in at most three sentences."""

INSTRUCTIONS = {"score": SCORE_INSTRUCTION, "pairwise": PAIRWISE_INSTRUCTION}
MODEL_FIRST, MODEL_SECOND = "model first", "model second"
ORDERS = {"score": (MODEL_FIRST,), "pairwise": (MODEL_FIRST, MODEL_SECOND)}


def read_grades(reply: str) -> tuple[float, float] | None:
    r"""The two grades on the first line, or None if it doesn't hold exactly two from 1 to 10.

    >>> read_grades("8 6.5\nThe first is right.")
    (8.0, 6.5)
    """
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"[*`\"(\[]*{number}[\s,]+{number}[*`\")\].]*", _first_line(reply))
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if min(first, second) >= 1 and max(first, second) <= 10 else None


def read_preference(reply: str) -> str | None:
    r"""``first``, ``second`` or ``tie`` if the first line is that word, else None.

    >>> read_preference("**Second**\nIt answers the request.")
    'second'
    """
    word = _first_line(reply).strip("*`\"'.,:()[] ").lower()
    return word if word in ("first", "second", "tie") else None


def _first_line(reply: str) -> str:
    """The first line with text, after a reasoning model's thoughts."""
    answer = re.sub(r"^\s*<think>.*?</think>", "", reply, flags=re.DOTALL)
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")


def summarise_grades(verdicts: dict[tuple[Pair, str], Any]) -> tuple[int, dict[str, Any] | None]:
    """How many pairs have grades, and 100 * sum of the model's / sum of the references' grades."""
    seeds = sorted({seed for (seed, _), _ in verdicts})
    indices = sorted({index for (_, index), _ in verdicts})
    grades = np.zeros((2, len(seeds), len(indices)))  # 0: no verdict, in both sums
    for ((seed, index), _), verdict in verdicts.items():
        if verdict is not None:
            grades[:, seeds.index(seed), indices.index(index)] = verdict
    num_judged = int(np.count_nonzero(grades[1]))
    if num_judged == 0:
        return 0, None
    by_seed = _percent_of_reference(grades.sum(-1)[..., None])[:, 0]
    judged = by_seed[~np.isnan(by_seed)].tolist()
    resampled = _percent_of_reference(grades @ resampled_counts(len(indices)).T)
    known = ~np.isnan(resampled)
    usable = known.any(0)
    means = np.where(known, resampled, 0.0).sum(0)[usable] / known.sum(0)[usable]
    mean, deviation = mean_and_deviation(judged)
    return num_judged, {
        "score": {
            "mean": mean,
            "deviation_over_seeds": deviation,
            "interval_95": np.quantile(means, TAILS).tolist(),
            "by_seed": [None if np.isnan(value) else float(value) for value in by_seed],
        },
        "model_grade": {"mean": float(grades[0].sum() / num_judged)},
        "reference_grade": {"mean": float(grades[1].sum() / num_judged)},
    }


def _percent_of_reference(sums: np.ndarray) -> np.ndarray:
    """Model over reference in percent, for any further axes; nan where nothing was judged."""
    model, reference = sums
    return 100 * np.divide(model, reference, out=np.full(model.shape, np.nan), where=reference > 0)


def summarise_preferences(
    verdicts: dict[tuple[Pair, str], Any],
) -> tuple[int, dict[str, Any] | None]:
    """How many pairs have both verdicts, and how often both prefer the model."""
    points: dict[Pair, float] = {}
    preferred, num_alike = Counter(), 0
    for pair in dict.fromkeys(pair for pair, _ in verdicts):
        ahead, behind = verdicts[pair, MODEL_FIRST], verdicts[pair, MODEL_SECOND]
        if ahead is None or behind is None:
            continue
        preferred.update((ahead, behind))
        agreed = {("first", "second"): 1.0, ("second", "first"): 0.0, ("tie", "tie"): 0.5}
        num_alike += (ahead, behind) in agreed
        points[pair] = agreed.get((ahead, behind), 0.5)
    if not points:
        return 0, None
    seeds = sorted({seed for (seed, _), _ in verdicts})
    of_seed = {seed: [p for (s, _), p in points.items() if s == seed] for seed in seeds}
    by_seed = [100 * sum(v) / len(v) if v else None for v in of_seed.values()]
    of_example: dict[int, list[float]] = {}
    for (_, index), value in points.items():
        of_example.setdefault(index, []).append(100 * value)
    mean, deviation = mean_and_deviation([value for value in by_seed if value is not None])
    num_decided = preferred["first"] + preferred["second"]
    outcomes = Counter(points.values())
    return len(points), {
        "win_rate": {
            "mean": mean,
            "deviation_over_seeds": deviation,
            "interval_95": list(bootstrap_interval([sum(v) / len(v) for v in of_example.values()])),
            "by_seed": by_seed,
        },
        "win": {"mean": 100 * outcomes[1.0] / len(points)},
        "tie": {"mean": 100 * outcomes[0.5] / len(points)},
        "loss": {"mean": 100 * outcomes[0.0] / len(points)},
        "orders_agree": {"mean": 100 * num_alike / len(points)},
        "first_shown_preferred": {
            "mean": 100 * preferred["first"] / num_decided if num_decided else None
        },
    }
