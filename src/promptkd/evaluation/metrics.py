"""Scores of generated text, as pure functions without torch, and the names they are asked for by.

``METRICS`` score one response, in percent. What describes several responses has a number in its
name: ``distinct_2`` (different n-grams) and ``exact_match@5`` (pass@k of any metric).
"""

import math
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeAlias

from nltk.stem import porter
from nltk.util import ngrams
from rapidfuzz.distance import LCSseq
from rouge_score import tokenize

from promptkd.errors import UserError
from promptkd.keys import function_named, suggest

TextMetric: TypeAlias = Callable[[str, Sequence[str], Mapping[str, Any]], float | None]
"""(response, references, the other fields of its prediction) -> a number, None where undefined."""


class _RememberingStemmer(porter.PorterStemmer):
    @lru_cache(maxsize=200_000)  # noqa: B019 - one stemmer per process
    def stem(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, word: str, to_lowercase: bool = True
    ) -> str:
        return super().stem(word, to_lowercase)


_STEMMER = _RememberingStemmer()


def rouge_l(response: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent, the best over the references.

    Google's (``rouge_score``, stemmed): its own tokenisation and stemmer, with the longest common
    subsequence computed by rapidfuzz, which is about a hundred times faster and equal.

    Source: Lin 2004; the protocol of MiniLLM's and PromptKD's evaluation.

    >>> rouge_l("the cat sat", ["the cat sat down", "dogs"])
    85.71428571428571
    """
    predicted = tokenize.tokenize(response, _STEMMER)
    return max(_rouge_l_f1(predicted, tokenize.tokenize(r, _STEMMER)) for r in references)


def rouge_l_unicode(response: str, references: Sequence[str]) -> float:
    """ROUGE-L over ``unicode_words``, not stemmed: for text in any script.

    >>> rouge_l_unicode("你好", ["你好世界"])
    66.66666666666667
    """
    predicted = unicode_words(response)
    return max(_rouge_l_f1(predicted, unicode_words(r)) for r in references)


def _rouge_l_f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return 0.0
    common = LCSseq.similarity(predicted, reference)
    precision, recall = common / len(predicted), common / len(reference)
    if precision + recall == 0:
        return 0.0
    return 100 * 2 * precision * recall / (precision + recall)


UNSPACED = (
    *("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "TANGUT", "NUSHU"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW TAI LUE", "JAVANESE", "BALINESE"),
)
"""Scripts written without spaces between words, as Unicode's names of characters begin."""


def unicode_words(text: str) -> list[str]:
    """Words of letters and digits in any script, without case and punctuation.

    A letter of a script without spaces is a word of its own, as is a symbol beyond ASCII (an
    emoji); combining marks stay with their letter.

    >>> unicode_words("Straße, 你好 👍")
    ['strasse', '你', '好', '👍']
    """
    words: list[str] = []
    goes_on = False
    for character in unicodedata.normalize("NFKC", text).casefold():
        kind = _kind(character)
        if (kind == "letter" and goes_on) or (kind == "mark" and words):
            words[-1] += character
        elif kind in ("letter", "alone"):
            words.append(character)
        if kind not in ("mark", "invisible"):
            goes_on = kind == "letter"
    return words


@lru_cache(maxsize=10_000)
def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return "invisible"
    if category[0] == "M":
        return "mark"
    if category[0] == "L" and unicodedata.name(character, "").startswith(UNSPACED):
        return "alone"
    if category[0] in "LN":
        return "letter"
    return "alone" if category[0] == "S" and not character.isascii() else "other"


def num_ascii_and_others(references: Sequence[str]) -> tuple[int, int]:
    """How many letters, digits and symbols are ASCII, and how many are not.

    >>> num_ascii_and_others(["Café 👍!"])
    (3, 2)
    """
    counted = [c for r in references for c in r if _kind(c) in ("letter", "alone")]
    num_ascii = sum(c.isascii() for c in counted)
    return num_ascii, len(counted) - num_ascii


def suits_rouge_l(references: Sequence[str]) -> bool:
    """Whether Google's tokeniser, which keeps a-z and 0-9, keeps most of what is written.

    >>> suits_rouge_l(["Café au lait"]), suits_rouge_l(["你好世界"]), suits_rouge_l(["!?"])
    (True, False, False)
    """
    num_ascii, num_others = num_ascii_and_others(references)
    return num_ascii > 0 and num_ascii >= num_others


def _has_words(references: Sequence[str]) -> bool:
    return any(map(unicode_words, references))


def exact_match(response: str, references: Sequence[str]) -> float:
    """100 if the response equals a reference up to case, punctuation and spaces.

    Articles count, as in the protocol of MiniLLM's and PromptKD's evaluation: "A" is an answer.
    """
    return 100.0 * any(_normalised(response) == _normalised(r) for r in references)


def _normalised(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(text.split())


def final_answer(response: str, references: Sequence[str]) -> float:
    """100 if the answer that the response ends with is that of a reference.

    Numbers are compared as numbers: "1,200" is "1200.0".
    """
    return 100.0 * any(_same(extract_answer(response), extract_answer(r)) for r in references)


MARKED = re.compile(r"####\s*(.+)|answer\s*(?:is|:)\s*(.+)", re.IGNORECASE)
NUMBER = re.compile(r"[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")


def extract_answer(text: str) -> str:
    r"""The last ``\boxed{}``, or what follows the last "####" or "answer is", or the last number.

    The first of these that there is; text with none of them is an answer as a whole.

    >>> extract_answer(r"Thus \boxed{x_{1}}."), extract_answer("It is 2.\n#### 4")
    ('x_{1}', '4')
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    marked = MARKED.findall(text)
    if marked:
        text = "".join(marked[-1])
        first = NUMBER.search(text)
        return first[0] if first else text.strip()
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else text.strip()


def _last_boxed(text: str) -> str | None:
    r"""What stands between the braces of the last ``\boxed{...}``, nested ones included."""
    _, opening, rest = text.rpartition(r"\boxed{")
    depth = 1
    for place, character in enumerate(rest if opening else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return None


def _same(first: str, second: str) -> bool:
    own, other = _number(first), _number(second)
    if own is not None and other is not None:
        return math.isclose(own, other, rel_tol=1e-9)
    return _normalised(first) == _normalised(second)


def _number(text: str) -> float | None:
    if not NUMBER.fullmatch(text):
        return None
    above, _, below = text.replace(",", "").replace("−", "-").partition("/")
    return float(above) / float(below or 1) if not below or float(below) else None


def repeated_4_grams(response: str) -> float:
    """Percent of the 4-grams that stood before in the same response; 0 for fewer than two.

    >>> repeated_4_grams("again and again and again and again")
    50.0
    """
    grams = list(ngrams(unicode_words(response), 4))
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def distinct_n(responses: Sequence[str], n: int) -> float:
    """Percent of all n-grams of the responses that differ; 0 if there are none.

    Source: Li et al. 2016, arXiv:1510.03055.

    >>> distinct_n(["a b a", "a b"], 1)
    40.0
    """
    grams = [gram for response in responses for gram in ngrams(unicode_words(response), n)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimate, in percent, of one right answer among k samples.

    1 - C(n - c, k) / C(n, k), for c right ones among n.

    Source: Chen et al. 2021, arXiv:2107.03374, Eq. 1.

    >>> pass_at_k(4, 1, 2)
    50.0
    """
    assert 1 <= k <= num_samples, "checked when the metric was asked for"
    return 100 * (1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k))


def _of_references(
    function: Callable[[str, Sequence[str]], float],
    suits: Callable[[Sequence[str]], bool] = lambda references: True,
) -> TextMetric:
    """Undefined without references, or where those don't suit the metric."""
    return lambda response, references, _: (
        function(response, references) if references and suits(references) else None
    )


METRICS: dict[str, TextMetric] = {
    "rouge_l": _of_references(rouge_l, suits_rouge_l),
    "rouge_l_unicode": _of_references(rouge_l_unicode, _has_words),
    "exact_match": _of_references(exact_match),
    "final_answer": _of_references(final_answer),
    "repeated_4_grams": lambda response, references, _: repeated_4_grams(response),
}
"""What a single response is scored by; ``module:function`` names others."""

TEACHER_CROSS_ENTROPY = "teacher_cross_entropy"
"""Of a response under the teacher, nats per token: no text metric, and asked for by name."""
ALWAYS = ("rouge_l", "exact_match")
NEED_REFERENCES = (*ALWAYS, "rouge_l_unicode", "final_answer", "cross_entropy")


def metrics_of(references: Sequence[Sequence[str]], asked: Sequence[str] = ()) -> tuple[str, ...]:
    """Every metric of single responses: the paper's, what the text's script needs, and those asked.

    >>> metrics_of([["a"], ["你好"]], ["final_answer@3"])
    ('rouge_l', 'rouge_l_unicode', 'exact_match', 'final_answer')
    """
    foreign = any(num_ascii_and_others(own)[1] for own in references)
    names = {*ALWAYS, *(name.partition("@")[0] for name in asked if not _distinct(name))}
    names.discard(TEACHER_CROSS_ENTROPY)
    names |= {"rouge_l_unicode"} if foreign else set()
    return (*(name for name in METRICS if name in names), *sorted(names - METRICS.keys()))


def score_text(
    names: Sequence[str], response: str, references: Sequence[str], example: Mapping[str, Any]
) -> dict[str, float]:
    """The metrics that are defined for this response.

    Raises:
        UserError: if a user's function raises, or returns no number.
    """
    found = {name: _value(name, response, references, example) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _value(
    name: str, response: str, references: Sequence[str], example: Mapping[str, Any]
) -> float | None:
    if name in METRICS:
        return METRICS[name](response, references, example)
    function = function_named(name, "metric", "that returns a number")
    where = f"The metric {name} on the response to row {example['index']}"
    try:
        value = function(response, references, example)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{where} raised {type(error).__name__}: {error}. Mend it, or let it return None there."
        ) from error
    number = _number_of(value, where)
    if number is not None and not math.isfinite(number):
        raise UserError(f"{where} returned {number}. Return a finite number, or None.")
    return number


def _number_of(value: Any, where: str) -> float | None:
    """What a user's function returned; a truth value isn't taken for 1 or 0 percent."""
    if not isinstance(value, (bool, str)):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            return None if value is None else float(value)
    raise UserError(
        f"{where} returned {value!r:.80}, a {type(value).__name__}. Return a number (100.0 for "
        "what is right, 0.0 for what is wrong), or None."
    )


def check_metrics(names: Sequence[str], num_seeds: int, what: str = "metric") -> None:
    """Refuse unknown names, and pass@k of more samples than there are seeds.

    ``what`` they are stands in complaints.

    Raises:
        UserError: with the nearest known name.
    """
    for name in names:
        if _distinct(name) or name == TEACHER_CROSS_ENTROPY:
            continue
        base, at, k = name.partition("@")
        if ":" in base:
            function_named(base, what, "that returns a number")
        elif base not in METRICS:
            known = [*METRICS, TEACHER_CROSS_ENTROPY, "distinct_2", "exact_match@5"]
            raise UserError(f"unknown {what} '{name}'{suggest(name, known)}")
        if at and not (k.isdecimal() and 1 <= int(k) <= num_seeds):
            raise UserError(
                f"The metric {name} needs k responses to a request, and {num_seeds} seeds give "
                f"{num_seeds}. Name k from 1 to {num_seeds}, or more seeds."
            )


def check_criterion(metric: str, references: Sequence[Sequence[str]]) -> str | None:
    """Refuse to choose a student by ROUGE-L where most references don't suit it.

    Returns:
        A sentence where some don't: ROUGE-L leaves those requests out.

    Raises:
        UserError: with the metric to take instead; or if a user's own can't be imported.
    """
    if is_text_metric(metric):
        check_metrics((metric,), num_seeds=1, what="evaluation.metric")
    known = {index: own for index, own in enumerate(references) if own}
    unsuited = [index for index, own in known.items() if not suits_rouge_l(own)]
    if metric != "rouge_l" or not unsuited:
        return None
    found = (
        f"evaluation.metric rouge_l can't read {len(unsuited)} of {len(known)} references of "
        f"data.validation (the first is row {unsuited[0]}): its tokeniser keeps a-z and 0-9 alone"
    )
    other = "Set evaluation.metric=rouge_l_unicode, which reads every script, or exact_match"
    if 2 * len(unsuited) > len(known):
        raise UserError(f"{found}. {other}.", "PK110")
    return f"{found}, so the student is chosen by the others. {other}, to choose by all of them."


def is_text_metric(name: str) -> bool:
    """Whether responses alone decide it, and no model's losses."""
    return ":" in name or name in METRICS


def _distinct(name: str) -> int:
    """The n of ``distinct_n``, 0 for another name."""
    found = re.fullmatch(r"distinct_([1-9])", name)
    return int(found[1]) if found else 0


def of_all_responses(name: str) -> tuple[str, int] | None:
    """("distinct", n) or (metric, k) for names that describe several responses, else None.

    >>> of_all_responses("distinct_2"), of_all_responses("exact_match@5")
    (('distinct', 2), ('exact_match', 5))
    """
    if n := _distinct(name):
        return "distinct", n
    base, at, k = name.partition("@")
    return (base, int(k)) if at else None
