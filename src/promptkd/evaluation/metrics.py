"""Scores of generated text: ROUGE-L and exact match. Pure functions, no torch.

ROUGE-L is Google's (``rouge_score``, stemmed, F1, maximum over references): its own tokenisation
and stemmer, with the longest common subsequence computed by rapidfuzz, which is about a hundred
times faster and equal (tests/test_metrics.py).
"""

import string
from collections.abc import Sequence
from functools import lru_cache

from nltk.stem import porter
from rapidfuzz.distance import LCSseq
from rouge_score import tokenize


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


def rouge_reads(text: str) -> bool:
    """Whether ROUGE's tokenisation leaves anything of a text: it knows a-z and 0-9 alone.

    >>> rouge_reads("Straße"), rouge_reads("你好")
    (True, False)
    """
    return bool(tokenize.tokenize(text, None))


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
