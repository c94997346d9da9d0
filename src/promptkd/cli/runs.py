"""Commands that make runs: a student, a check, training, a study, the demonstration."""

from pathlib import Path
from typing import Annotated

import typer

from promptkd.cli.app import app, keep_freed_memory
from promptkd.errors import UserError


@app.command("init-student")
def init_student(
    teacher: Annotated[str, typer.Option(help="hub id, directory or .gguf file")],
    layers: Annotated[int, typer.Option(help="how many of its layers the student keeps")],
    output: Annotated[Path, typer.Option(help="directory of the student")],
    calibration: Annotated[
        list[str] | None, typer.Option(help="data with responses; without it, evenly spaced")
    ] = None,
    search: Annotated[str, typer.Option(help="greedy | single (quicker, worse)")] = "greedy",
    template: Annotated[str, typer.Option(help="as data.template in a recipe")] = "auto",
    rows: Annotated[int, typer.Option(min=1, help="calibration rows used")] = 32,
) -> None:
    """Make a student out of the teacher by dropping the layers that matter least."""
    if search not in ("single", "greedy"):
        raise UserError(f"--search is '{search}'; known: single, greedy.")
    from promptkd.pruning import init_student as run

    keep_freed_memory()

    record = run(
        teacher,
        layers,
        output,
        calibration=calibration,
        search=search,
        template=template,
        num_calibration_rows=rows,
    )
    typer.echo(f"layers dropped: {record['dropped']} ({record['search']})")
    if "loss_whole" in record:
        typer.echo(
            f"cross-entropy, nats per token: teacher {record['loss_whole']:.3f}, "
            f"student {record['loss_pruned']:.3f}"
        )
    typer.echo(f"student: {output}")


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
) -> None:
    """Prove that a recipe works before it runs: the pair, the data, the memory, one step."""
    from promptkd.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from promptkd.api import check as run

    keep_freed_memory()

    found = run(loaded)
    first, steps = found["first"], found["steps"]
    seconds = first["seconds_writing"] + first["seconds_learning"]
    typer.echo(
        f"one step: loss {first['loss']:.3f} nats per token, {first['response_length']:.0f} tokens "
        f"per response, {100 * first['share_ended']:.0f}% ended, {seconds:.1f} s "
        f"({first['seconds_writing']:.1f} s writing); the slowest, since it is the first"
    )
    typer.echo(f"memory: {first['peak_memory'] / 1e9:.1f} GB at most so far")
    typer.echo(f"the run: {steps} steps, some {steps * seconds / 60:.0f} min, into {loaded.output}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
) -> None:
    """Distil. The same command again resumes a run that was stopped."""
    from promptkd.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from promptkd.api import train as run

    keep_freed_memory()

    typer.echo(f"run: {run(loaded)}")


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(help="YAML file; see docs/study.md", metavar="study.yaml")
    ],
) -> None:
    """Train and score several methods with several seeds; one table. The same command resumes."""
    from promptkd.study.file import load_study

    loaded = load_study(file)
    from promptkd.study.run import run_study

    keep_freed_memory()

    typer.echo(f"study: {run_study(loaded)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="directory of the demonstration")] = Path(
        "runs/demo"
    ),
) -> None:
    """A real teacher, a real student, start to end on this machine, nothing to configure."""
    from promptkd.demo import demo as run

    keep_freed_memory()
    typer.echo(f"report: {run(output)}")
