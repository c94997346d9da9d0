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
ENDS = re.compile(r"[.!?]+(?=\s|$)")
WORD = re.compile(r"[^\W\d_]+")
OPENING = 4
"""The topic is named within so many words."""


def leaks(response: str, references: Sequence[str], example: Mapping[str, Any]) -> float:
    """100 for a response that speaks of an answer which only its teacher has read.

    >>> leaks("The reference answer is Rome.", (), {}), leaks("Rome.", (), {})
    (100.0, 0.0)
    """
    return 100.0 * bool(BETRAYALS.search(response))


def follows_style(response: str, references: Sequence[str], example: Mapping[str, Any]) -> float:
    """100 for one or two sentences that begin with the topic, a word of the request.

    >>> asked = {"request": "What is the capital of Italy?"}
    >>> follows_style("Italy's capital is Rome. It is old.", (), asked)
    100.0
    >>> follows_style("I think it is Rome.", (), asked)
    0.0
    """
    sentences = [part for part in ENDS.split(response) if part.strip()]
    asked = {word for word in WORD.findall(example["request"].lower()) if len(word) > 3}
    opening = WORD.findall(response.lower())[:OPENING]
    return 100.0 * (1 <= len(sentences) <= 2 and any(word in asked for word in opening))
