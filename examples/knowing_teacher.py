"""Metrics for students of teachers that know more: a style that is followed, a source that shows.

As ``evaluation.metric`` or ``--metric``: ``examples.knowing_teacher:follows_style``, ``...:leaks``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

BETRAYALS = re.compile(
    r"\b(reference (answer|response)|(good|given|provided|correct) answer (is|was|says)"
    r"|as (given|provided|mentioned) (above|in the)|the (hint|solution) (above|given|says))\b",
    re.IGNORECASE,
)
ENDS = re.compile(r"(?<=[.!?])\s+")
WORD = re.compile(r"[^\W\d_]{4,}")
LABELLED = re.compile(r"([^\W\d_]+): +(\S.*)", re.DOTALL)
MOST_SENTENCES = 2
ASKING = {"what", "when", "where", "which", "whose", "could", "would", "should", "give", "list"}
ASKING |= {"name", "some", "tell", "that", "this", "with", "from", "there", "these", "have", "does"}


def leaks(response: str, references: Sequence[str], example: Mapping[str, Any]) -> float:
    """100 for a response that speaks of an answer which only its teacher has read.

    >>> leaks("The reference answer is Rome.", (), {}), leaks("Rome.", (), {})
    (100.0, 0.0)
    """
    return 100.0 * bool(BETRAYALS.search(response))


def follows_style(response: str, references: Sequence[str], example: Mapping[str, Any]) -> float:
    """100 for a word of the request, a colon, and one or two sentences.

    >>> asked = {"request": "What is the capital of Italy?"}
    >>> follows_style("Capital: Italy's capital is Rome. It is old.", (), asked)
    100.0
    >>> follows_style("Italy's capital is Rome.", (), asked)
    0.0
    """
    found = LABELLED.fullmatch(response.strip())
    asked = {word.lower() for word in WORD.findall(example["request"])}
    return 100.0 * (
        found is not None
        and found[1].lower() in asked
        and len(ENDS.split(found[2])) <= MOST_SENTENCES
    )


def in_style(request: str, reference: str) -> str | None:
    """The reference as the guide wants it; None where the request names no topic.

    >>> in_style("What is the capital of Italy?", "It is Rome. Rome is old. It is big.")
    'Capital: It is Rome. Rome is old.'
    """
    words = [word for word in WORD.findall(request) if word.lower() not in ASKING]
    if not words:
        return None
    topic = max(words, key=len)
    kept = " ".join(ENDS.split(reference.strip())[:MOST_SENTENCES])
    return f"{topic[0].upper()}{topic[1:]}: {kept}"
