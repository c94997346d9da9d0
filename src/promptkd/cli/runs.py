"""Commands that make runs: a student, a check, training, a study, the demonstration."""

from pathlib import Path
from typing import Annotated, Literal

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
    set: Annotated[
        list[str] | None,
        typer.Option(help="data.columns.X=... and data.template_options.X=... as in a recipe"),
    ] = None,
) -> None:
    """Make a student out of the teacher by dropping the layers that matter least."""
    if search not in ("single", "greedy"):
        raise UserError(f"--search is '{search}'; known: single, greedy.")
    from promptkd.keys import override
    from promptkd.pruning import init_student as run

    asked = override({}, set or [])
    of_data = asked.get("data", {})
    if asked.keys() - {"data"} or not {*of_data} <= {"columns", "template_options"}:
        raise UserError("--set takes data.columns.NAME=... and data.template_options.NAME=...")
    keep_freed_memory()
    record = run(
        teacher,
        layers,
        output,
        calibration=calibration,
        search=search,
        template=template,
        num_calibration_rows=rows,
        **of_data,
    )
    typer.echo(record)
    typer.echo(f"student: {output}")


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="compute for so many, from shapes alone; nothing runs")
    ] = None,
    memory: Annotated[float, typer.Option(min=1, help="GB of each, with --gpus")] = 80.0,
) -> None:
    """Prove that a recipe works before it runs: models, data, first steps; time and memory."""
    from promptkd.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if gpus is not None:
        from promptkd.methods import build_method
        from promptkd.training.planned import Cluster, plan_lines, plan_of

        method = build_method(loaded.method.name, **loaded.method.options)
        plan = plan_of(loaded, method, Cluster(gpus, memory))
        for line in plan_lines(plan, loaded.optimization.max_steps):
            typer.echo(line)
        return
    from promptkd.api import check as run

    keep_freed_memory()

    typer.echo(run(loaded))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    restart_from: Annotated[
        int | None,
        typer.Option(min=0, metavar="STEP", help="go back to its checkpoint; rates may differ"),
    ] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="go on though data or settings differ")
    ] = False,
) -> None:
    """Distil. The same command again resumes a run that was stopped; more steps extend one."""
    from promptkd.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from promptkd.api import train as run
    from promptkd.ranks import leave

    keep_freed_memory()

    done = run(loaded, restart_from=restart_from, allow_changes=allow_changes)
    typer.echo(f"run: {done.path}")
    leave()


def _tuning(asked: str | None) -> Literal["whole", "lora"] | None:
    if asked not in (None, "whole", "lora"):
        raise UserError(f"--tune-teacher is '{asked}'; known: whole, lora.")
    return asked


def _text_file(path: Path | None) -> str | None:
    if path is not None and not path.is_file():
        raise UserError(f"--context {path} is no file. Name a text that only the teacher reads.")
    return path and str(path)


@app.command()
def distill(
    teacher: Annotated[str, typer.Option(help="hub id, directory, .gguf file or finished run")],
    data: Annotated[list[str], typer.Option(help="requests, with reference responses or without")],
    output: Annotated[Path, typer.Option(help="directory of all stages; the same goes on there")],
    student: Annotated[str | None, typer.Option(help="its start; else the teacher, pruned")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="of the teacher's, that a pruned student keeps")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="never trained on; without it, a tenth of the data")
    ] = None,
    tune_teacher: Annotated[
        str | None, typer.Option(help="whole | lora: it learns from the references first")
    ] = None,
    method: Annotated[str, typer.Option(help="a method's name, or module:function")] = "promptkd",
    context: Annotated[
        Path | None, typer.Option(help="a text file that only the teacher reads")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="such as 90m or 2h: chooses the numbers of steps")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="key=value: a recipe's key for all stages, or STAGE.key for one"),
    ] = None,
) -> None:
    """The whole path: teacher and requests to a student, scores and a report. Resumable."""
    if student is not None and layers is not None:
        raise UserError("--student and --layers are both given. Name a student, or prune one.")
    from promptkd.distillation.distill import distill as run
    from promptkd.keys import override

    keep_freed_memory()
    done = run(
        teacher,
        data,
        output,
        student=student,
        layers=layers,
        held_out=held_out,
        tune_teacher=_tuning(tune_teacher),
        method=method,
        context=_text_file(context),
        budget_seconds=None if budget is None else _seconds(budget),
        settings=override({}, set or []),
        say=typer.echo,
    )
    typer.echo(f"report: {done.report}")


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(help="YAML file; see docs/study.md", metavar="study.yaml")
    ],
    table_only: Annotated[
        bool, typer.Option("--table-only", help="tables and figures of what is stored; no training")
    ] = False,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="with --table-only: score kept responses anew")
    ] = False,
    power: Annotated[
        bool, typer.Option("--power", help="which designs could tell --detect apart; no training")
    ] = False,
    detect: Annotated[
        float, typer.Option(min=0, help="a difference in the score that decides")
    ] = 0.7,
) -> None:
    """Train and score several methods with several seeds; one table. The same command resumes."""
    from promptkd.study.file import load_study

    loaded = load_study(file)
    if rescore and not table_only:
        raise UserError("--rescore is for what is stored: give --table-only, too.")
    if power:
        from promptkd.study.stored import power as report_power

        typer.echo(report_power(loaded, detect))
        return
    if table_only:
        from promptkd.study.stored import conclude

        conclude(loaded, rescore=rescore)
        typer.echo(f"study: {loaded.place}")
        return
    from promptkd.study.run import run_study

    keep_freed_memory()

    typer.echo(f"study: {run_study(loaded)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="directory of the demonstration")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="of all its stages")] = 0,
) -> None:
    """A real teacher, a real student, start to end on this machine, nothing to configure."""
    from promptkd.distillation.demo import demo as run

    keep_freed_memory()
    typer.echo(f"report: {run(output, seed).report}")


def _seconds(budget: str) -> float:
    """90s, 90m and 2h in seconds."""
    number, unit = budget[:-1], budget[-1:]
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    if unit not in units or not number.replace(".", "", 1).isdigit() or float(number) == 0:
        raise UserError(f"--budget is '{budget}'. Write a number and s, m or h, such as 90m or 2h.")
    return float(number) * units[unit]
