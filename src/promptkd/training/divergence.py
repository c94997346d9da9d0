"""Which weights of a run that diverged can be trusted."""

from collections.abc import Mapping
from statistics import median

LARGEST_RISE = 3.0
"""Times the median loss so far: what is above it isn't noise."""


def is_sane(losses: Mapping[int, float], step: int) -> bool:
    """Whether the weights after ``step`` had a loss like those before.

    The step after it tells, which began with them. Where that one was never logged, ``step`` has
    to do: it is the run's latest.

    Args:
        losses: of each step, as logged.
        step: one of them.

    >>> losses = {1: 2.0, 2: 1.9, 3: 2.1, 4: 90.0}
    >>> [is_sane(losses, step) for step in losses]
    [True, True, False, False]
    """
    judge = step + 1 if step + 1 in losses else step
    before = [abs(loss) for other, loss in losses.items() if other < judge]
    return not before or abs(losses[judge]) <= LARGEST_RISE * median(before)
