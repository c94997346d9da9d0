"""The bar of the responses that an engine generates, and how the engine tells it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from promptkd.bars import progress_bar

Progress = Callable[[float], object]
"""Is told how many responses more are written; a token is a part of one."""


@runtime_checkable
class ReportsProgress(Protocol):
    """An engine, which says how it gets on."""

    progress: Progress


def unseen(_: float) -> None:
    """Nobody looks."""


@contextmanager
def responses_bar(
    engine: ReportsProgress, total: int, what: str, *, shown: bool = True, stays: bool = True
) -> Iterator[None]:
    """A bar of the responses that the engine writes meanwhile.

    Args:
        total: how many there will be.
        stays: on the screen when all is written.
    """
    how = {"unit": "response", "unit_scale": True, "disable": not shown, "leave": stays}
    with progress_bar(total=total, desc=what, **how) as bar:
        engine.progress = lambda responses: bar.update(min(responses, total - bar.n))
        try:
            yield
        finally:
            engine.progress = unseen
