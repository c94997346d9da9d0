"""Does the teacher do the task yet? Measured before anything is trained. No torch."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

ENDED = 80
"""Percent of its responses that a teacher should end by itself."""
NATS = 2.0
"""Of cross-entropy per token of the references; fluent text by others takes about as much."""
LENGTHS = 2.0
"""How many times as long, or as short, as the references its responses may be."""


def verdict(found: Mapping[str, Any], reference_tokens: Sequence[int]) -> str:
    """What was measured of the teacher, and whether to tune it first.

    Args:
        found: its evaluation.
        reference_tokens: the references' lengths in its tokens.
    """
    scores = {name: score["mean"] for name, score in found["scores"].items()}
    said = [f"ends {scores['ended']:.0f}% of its responses"]
    said.append(f"{scores['response_length']:.0f} tokens each")
    if "cross_entropy" in scores:
        said.append(f"cross-entropy {scores['cross_entropy']:.2f} nats per reference token")
    doubts = _doubts(scores, reference_tokens)
    text = f"the teacher {', '.join(said)}"
    if not doubts:
        return f"{text}: it does this task"
    advice = "tune it on your references first: --tune-teacher whole, or lora"
    if not reference_tokens:
        advice = "bring requests with reference responses and --tune-teacher, or another teacher"
    return f"{text}. It doesn't do this task yet ({'; '.join(doubts)}): {advice}"


def _doubts(scores: Mapping[str, float], reference_tokens: Sequence[int]) -> list[str]:
    doubts = []
    if scores["ended"] < ENDED:
        doubts.append(f"fewer than {ENDED}% end")
    if scores.get("cross_entropy", 0.0) > NATS:
        doubts.append(f"more than {NATS:g} nats")
    if reference_tokens:
        ratio = scores["response_length"] / fmean(reference_tokens)
        if not 1 / LENGTHS <= ratio <= LENGTHS:
            doubts.append(f"{ratio:.1f} times the length of the references")
    return doubts
