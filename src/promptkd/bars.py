"""Progress bars: in a terminal or notebook as such, in a log as lines now and then. No torch."""

import sys
import time
from typing import Any

import tqdm.auto
import tqdm.notebook
import tqdm.std

SECONDS_BETWEEN_LINES = 30.0
"""In a log."""


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """``tqdm``, also in notebooks; where nobody watches (a file, a pipe) a line now and then."""
    in_notebook = issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm_notebook)
    if in_notebook or sys.stderr.isatty():
        return tqdm.auto.tqdm(iterable, **options)
    options["position"] = 0  # a bar below another would move a cursor that a file hasn't
    return tqdm.std.tqdm(iterable, file=Log(sys.stderr), **options)


class Log:
    """A file to which bars are written as lines: at first, every 30 seconds, and at last."""

    def __init__(self, file: Any):
        self._file = file
        self._unwritten = ""
        self._written_at = -SECONDS_BETWEEN_LINES

    def write(self, text: str) -> None:
        """Take what tqdm writes: a carriage return and the bar, or a newline after the last."""
        ended = text == "\n"
        self._unwritten = text.strip() or self._unwritten
        due = time.monotonic() - self._written_at >= SECONDS_BETWEEN_LINES
        if self._unwritten and (ended or due):
            self._file.write(f"{self._unwritten}\n")
            self._file.flush()
            self._unwritten, self._written_at = "", time.monotonic()

    def flush(self) -> None:
        """Lines are flushed when they are written."""
