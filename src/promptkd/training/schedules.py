"""Learning rates as a function of the step: nothing to save, nothing to restore."""

import math

from promptkd.config import OptimizationSection


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
