"""The frame of the command line: how commands are found, run and ended. No torch."""

import io
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer

from promptkd.errors import Stopped, UserError, sentence_of
from promptkd.files import write_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a large generative language model into a small one.",
)
FAILED, DEFECT = 1, 70
"""Exit codes, as docs/cli.md lists them; 2 is a wrong command line."""
SEVERAL = ("--seeds", "--data", "--held-out", "--set", "--calibration", "--metric", "--tasks")


def keep_freed_memory() -> None:
    """Settings of the whole process, which are a command's to make and no loader's."""
    from transformers.utils import logging

    from promptkd.kernels import allocator

    allocator.keep_freed_memory()
    logging.disable_progress_bar()


def _repeat_options(arguments: list[str]) -> list[str]:
    """``--seeds 10 20`` as click wants it: ``--seeds 10 --seeds 20``."""
    expanded: list[str] = []
    current = ""
    for argument in arguments:
        if argument.startswith("-"):
            current = argument if argument in SEVERAL else ""
            if not current:
                expanded.append(argument)
        elif current:
            expanded += [current, argument]
        else:
            expanded.append(argument)
    return expanded


def main(arguments: list[str] | None = None) -> None:
    """Run a command; however it ends, one sentence says so and the exit code says of which kind."""
    given: Any = _repeat_options(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show all characters
            stream.reconfigure(errors="backslashreplace")
    with _interruptible() as received:
        _run(given, received)


def _run(given: Any, received: list[int]) -> None:
    try:
        app(given)
    except SystemExit as end:
        aborted = end.__context__ and end.__context__.__cause__  # click takes both for Ctrl-C
        if isinstance(aborted, KeyboardInterrupt):
            number = received[0] if received else signal.SIGINT
            sentence = "interrupted. What was saved is intact: the same command goes on."
            _end(sentence, 128 + number)
        if isinstance(aborted, EOFError):
            _end(_defect(aborted), DEFECT)
        raise
    except UserError as error:
        _end(str(error), FAILED)
    except Stopped as stopped:
        _end(str(stopped), stopped.status)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is not None:
            _end(sentence, FAILED)
        _end(_defect(error), DEFECT)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """What batch systems send interrupts like Ctrl-C; gives the signals that did."""
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(sentence: str, code: int) -> NoReturn:
    with suppress(OSError):  # of a full disk, say, that the output goes to
        typer.echo(f"promptkd: {sentence}", err=True)
    sys.exit(code)


def _defect(error: Exception) -> str:
    """Keep the traceback of an error that no user can have caused, and ask for it."""
    text = "".join(traceback.format_exception(error))
    try:
        place = Path(tempfile.mkdtemp(prefix="promptkd-"))  # this user's alone
        write_text(place / "traceback.txt", text)
        which = f"{place / 'traceback.txt'}, which holds the traceback"
    except (OSError, UserError):  # no space
        with suppress(OSError):
            typer.echo(text, err=True)
        which = "the traceback above"
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"a defect of promptkd ended this command ({type(error).__name__}: {reason:.200}). Please "
        f"report it with {which}. What was saved is intact."
    )
