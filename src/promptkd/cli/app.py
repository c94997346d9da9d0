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

from promptkd.config import Recipe
from promptkd.errors import Stopped, UserError, sentence_of
from promptkd.files import out_of_space, write_text
from promptkd.findings import Finding
from promptkd.training.forecast import duration

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


def show_scores(results: dict[str, Any]) -> None:
    for name, result in results.items():
        cut = f", {result['num_cut_requests']} requests cut" if result["num_cut_requests"] else ""
        typer.echo(f"{name}: {result['num_examples']} examples, seeds {result['seeds']}{cut}")
        for score, values in result["scores"].items():
            shown = f"  {score:24} {values['mean']:8.3f}"
            if len(result["seeds"]) > 1 and "deviation_over_seeds" in values:
                shown += f" ± {values['deviation_over_seeds']:.2f} over seeds"
            if "interval_95" in values:
                low, high = values["interval_95"]
                shown += f", 95% [{low:.2f}, {high:.2f}]"
            if values.get("num_requests", result["num_examples"]) < result["num_examples"]:
                shown += f", over the {values['num_requests']} requests that have it"
            typer.echo(shown)


def check_lines(found: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """What ``check`` says of ``api.check``'s findings."""
    first, expected, measured = found["first"], found["forecast"], found["measured"]
    example = found["example"]
    tokens = example["response_tokens"]
    response = "generated while training" if tokens is None else f"|{'|'.join(tokens)}|"
    yield f"the first request: {example['request']!r}; its response, by tokens: {response!r}"
    if example["teacher_request"] is not None:
        yield f"what the teacher reads of it: {example['teacher_request']!r}"
    yield (
        f"one step: loss {first['loss']:.3f} nats per token, {first['response_length']:.0f} tokens "
        f"per response, {100 * first['share_ended']:.0f} % ended; the first took "
        f"{measured['seconds_start']:.1f} s, later ones {measured['seconds_step']:.1f} s"
    )
    yield f"memory: {found['peak_memory'] / 1e9:.1f} GB at most so far"
    yield (
        f"disk: checkpoints and students take {expected['bytes_disk'] / 1e9:.2f} GB, "
        f"{found['bytes_free'] / 1e9:.1f} GB are free"
    )
    if expected["bytes_disk"] > found["bytes_free"]:
        yield str(Finding("PK208", "the run needs more disk than is free."))
    yield (
        f"the run: {found['steps']} steps of {recipe.optimization.global_batch_size} requests "
        f"({found['epochs']:.2g} epochs), about {duration(expected['seconds'])} (steps "
        f"{duration(expected['seconds_steps'])}, evaluations "
        f"{duration(expected['seconds_evaluations'])}, saving "
        f"{duration(expected['seconds_saving'])}), into {recipe.output}"
    )


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
        if end.__context__ and isinstance(end.__context__.__cause__, KeyboardInterrupt):
            number = received[0] if received else signal.SIGINT
            sentence = "interrupted. What was saved is intact: the same command goes on."
            _end(sentence, 128 + number)
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
