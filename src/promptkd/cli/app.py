"""The frame of the command line: how commands are found, run and ended. No torch."""

import sys
from typing import Any

import typer

from promptkd.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a large generative language model into a small one.",
)
PLACE_ERRORS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
SEVERAL = ("--seeds", "--data", "--held-out", "--set", "--calibration", "--metric")


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
            typer.echo(shown)


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
    """Run a command; what the user can mend ends in one sentence and exit status 1."""
    given: Any = _repeat_options(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given)
    except UserError as error:
        typer.echo(f"promptkd: {error}", err=True)
        sys.exit(1)
    except PLACE_ERRORS as error:
        typer.echo(f"promptkd: {error.filename}: {error.strerror}. Name another place.", err=True)
        sys.exit(1)
