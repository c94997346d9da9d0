"""Signals that ask a run to stop: it does so after the step it is in, and saves."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from promptkd.errors import Stopped
from promptkd.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, and what batch systems send before their time is up."""


class StopRequest:
    """Whether somebody asked this process, or another one of the run, to stop.

    The first Ctrl-C asks; the second interrupts at once.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted meanwhile. Only a main thread can listen; elsewhere nothing changes.

        Raises:
            Stopped: at the second Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        except KeyboardInterrupt:
            sentence = "Stopped at once; the same command goes on from the last checkpoint."
            raise Stopped(sentence, signal.SIGINT) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any process of the run received; all of them must ask."""
        received = self._received
        if ranks.number == 1:
            return received
        everybody = [one for one in ranks.gather([received]) if one is not None]
        return min(everybody, default=None)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            self._received = signal.Signals(number)
            said = f"\n{self._received.name}: stopping after this step. Ctrl-C stops at once.\n"
            os.write(2, said.encode())  # a print could interrupt another print
