"""The frame of the command line: how commands are found, run and ended. No torch."""

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer

from promptkd.errors import Stopped, UserError, sentence_of
from promptkd.files import out_of_space, write_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a large generative language model into a small one.",
)
FAILED, DEFECT, INTERRUPTED = 1, 70, 130
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
    try:
        app(given)
    except SystemExit as end:
        if end.__context__ and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            _end("interrupted. What was saved is intact: the same command goes on.", INTERRUPTED)
        raise
    except UserError as error:
        _end(str(error), FAILED)
    except Stopped as stopped:
        _end(str(stopped), stopped.status)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None and out_of_space(error):  # torch hides the system's own error
            sentence = "No space left on a disk. Free some space and run the same command again."
        if sentence is not None:
            _end(sentence, FAILED)
        _end(_defect(error), DEFECT)


def _end(sentence: str, code: int) -> NoReturn:
    typer.echo(f"promptkd: {sentence}", err=True)
    sys.exit(code)


def _defect(error: Exception) -> str:
    """Keep the traceback of an error that no user can have caused, and ask for it."""
    path = Path(tempfile.gettempdir()) / f"promptkd-traceback-{os.getpid()}.txt"
    write_text(path, "".join(traceback.format_exception(error)))
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"a defect of promptkd ended this command ({type(error).__name__}: {reason:.200}). Please "
        f"report it with {path}, which holds the traceback. What was saved is intact."
    )
