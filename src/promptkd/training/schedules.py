"""Learning rates and lengths as functions of the step: nothing to save, nothing to restore."""

import math

from promptkd.config import LengthSchedule, OptimizationSection


def learning_rate(base: float, step: int, max_steps: int, options: OptimizationSection) -> float:
    """The rate of ``step`` (counted from 0): linear warm-up to ``base``, then the schedule.

    The first update already moves: step 0 of w warm-up steps has base / w.

    >>> options = OptimizationSection(max_steps=10, warmup_steps=2, schedule="linear")
    >>> [learning_rate(1.0, step, 10, options) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    warmup = options.warmup_steps
    if step < warmup:
        return base * (step + 1) / warmup
    done = (step - warmup) / max(1, max_steps - warmup)
    if options.schedule == "linear":
        return base * (1 - done)
    if options.schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * done))
    return base


def response_limit(limits: int | LengthSchedule, step: int, max_steps: int) -> int:
    """The most tokens of a response in ``step`` (counted from 0).

    >>> [response_limit(LengthSchedule(start=64, end=256), step, 5) for step in range(5)]
    [64, 112, 160, 208, 256]
    """
    if isinstance(limits, int):
        return limits
    done = step / (max_steps - 1) if max_steps > 1 else 1.0
    return round(limits.start + (limits.end - limits.start) * done)
