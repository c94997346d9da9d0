"""Scores of written text: ROUGE-L, exact match, intervals. Pure functions, no torch.

ROUGE-L is Google's (``rouge_score``, stemmed, F1, maximum over references): its own tokenisation
and stemmer, with the longest common subsequence computed by rapidfuzz, which is about a hundred
times faster and equal (tests/test_metrics.py).
"""

import math
import string
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from nltk.stem import porter
from rapidfuzz.distance import LCSseq
from rouge_score import tokenize

SCORED = ("rouge_l", "exact_match", "num_tokens", "ended")
"""What is known of every single response."""


class _RememberingStemmer(porter.PorterStemmer):
    @lru_cache(maxsize=200_000)  # noqa: B019 - one stemmer per process
    def stem(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, word: str, to_lowercase: bool = True
    ) -> str:
        return super().stem(word, to_lowercase)


_STEMMER = _RememberingStemmer()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent, the best over the references.

    Source: Lin 2004; the protocol of MiniLLM's and PromptKD's evaluation.

    >>> rouge_l("the cat sat", ["the cat sat down", "dogs"])
    85.71428571428571
    """
    predicted = tokenize.tokenize(prediction, _STEMMER)
    return max(_rouge_l_f1(predicted, tokenize.tokenize(r, _STEMMER)) for r in references)


def _rouge_l_f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return 0.0
    common = LCSseq.similarity(predicted, reference)
    precision, recall = common / len(predicted), common / len(reference)
    if precision + recall == 0:
        return 0.0
    return 100 * 2 * precision * recall / (precision + recall)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference up to case, punctuation and spaces.

    Articles count, as in the protocol of MiniLLM's and PromptKD's evaluation: "A" is an answer.
    """
    return 100.0 * any(_normalised(prediction) == _normalised(r) for r in references)


def _normalised(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(text.split())


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling examples.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("the interval of no values is undefined")
    data = np.asarray(values, dtype=float)
    random = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // len(data))
    means = np.concatenate(
        [
            data[random.integers(len(data), size=(min(at_once, left), len(data)))].mean(1)
            for left in range(num_resamples, 0, -at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of first - second over the same examples, with its bootstrap interval.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"paired scores need the same examples: {len(first)} and {len(second)}")
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return float(difference.mean()), *bootstrap_interval(
        difference.tolist(), level, num_resamples, seed
    )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
