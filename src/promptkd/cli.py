"""The command line: one command per function of the library; torch is imported only to work."""

import sys
from pathlib import Path
from typing import Annotated, Any

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
SEVERAL = ("--seeds", "--data", "--calibration")


@app.command("init-student")
def init_student(
    teacher: Annotated[str, typer.Option(help="hub id, directory or .gguf file")],
    layers: Annotated[int, typer.Option(help="how many of its layers the student keeps")],
    output: Annotated[Path, typer.Option(help="directory of the student")],
    calibration: Annotated[
        list[str] | None, typer.Option(help="data with responses; without it, evenly spaced")
    ] = None,
    search: Annotated[str, typer.Option(help="single | greedy (better, slower)")] = "single",
    template: Annotated[str, typer.Option(help="as data.template in a recipe")] = "alpaca",
    rows: Annotated[int, typer.Option(min=1, help="calibration rows used")] = 32,
) -> None:
    """Make a student out of the teacher by dropping the layers that matter least."""
    if search not in ("single", "greedy"):
        raise UserError(f"--search is '{search}'; known: single, greedy.")
    from promptkd.pruning import init_student as run

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
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
) -> None:
    """Distil. The same command again resumes a run that was stopped."""
    from promptkd.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from promptkd.api import train as run

    typer.echo(f"run: {run(loaded)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a run's directory, or any model")],
    data: Annotated[list[str], typer.Option(help="held-out requests, one file or several")],
    seeds: Annotated[list[int] | None, typer.Option(min=0, help="decoding seeds")] = None,
    output: Annotated[Path | None, typer.Option(help="directory for the scores")] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="only the first ones")] = None,
    template: Annotated[str | None, typer.Option(help="alpaca | chat | none | a file")] = None,
    max_request_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_response_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="6 as the authors' test script")] = 0,
    teacher: Annotated[str | None, typer.Option(help="also measure KL(student || teacher)")] = None,
) -> None:
    """Write responses to held-out requests, score them, and save both."""
    from promptkd.evaluation import PAPER_SEEDS
    from promptkd.evaluation import evaluate as run

    for source in data:
        result = run(
            model,
            source,
            seeds=seeds or PAPER_SEEDS,
            output=output,
            num_examples=num_examples,
            template=template,
            max_request_tokens=max_request_tokens,
            max_response_tokens=max_response_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            no_repeat_ngram_size=no_repeat_ngram_size,
            teacher=teacher,
        )
        typer.echo(f"{source}: {result['num_examples']} examples, seeds {result['seeds']}")
        for name, score in result["scores"].items():
            spread = (
                f" ± {score['deviation_over_seeds']:.2f} over seeds"
                if ("deviation_over_seeds" in score)
                else ""
            )
            interval = score.get("interval_95")
            shown = f", 95% [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            typer.echo(f"  {name:24} {score['mean']:8.3f}{spread}{shown}")
    typer.echo(f"scores: {output or Path(model) / 'evaluation'}")


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    request: Annotated[str, typer.Argument(help="the instruction")],
    input: Annotated[str, typer.Option(help="its context")] = "",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy")] = None,
) -> None:
    """Teacher, adapted teacher and student side by side on one request."""
    from promptkd.generation import generate as respond

    for author, response in respond(
        run, request, input=input, seed=seed, temperature=temperature
    ).items():
        typer.echo(f"--- {author}\n{response}\n")
    typer.echo(f"run: {run}")


@app.command("exposure-bias")
def exposure_bias(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    data: Annotated[
        list[str] | None, typer.Option(help="requests; the run's validation data if not given")
    ] = None,
) -> None:
    """R(l), E(l) and ExAccErr(l) of the student against the plain teacher."""
    from promptkd.exposure_bias import exposure_bias as measure

    result = measure(run, data)
    excess = result["excess"][-1]
    shown = "undefined (E is 0)" if excess is None else f"{excess:.1f} %"
    typer.echo(
        f"at {result['steps'][-1]} tokens: R {result['student_gap'][-1]:.3f} nats, "
        f"E {result['teacher_gap'][-1]:.3f} nats, ExAccErr {shown}"
    )
    typer.echo(f"curves: {run / 'exposure_bias.json'}")


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="a run's directory")],
    data: Annotated[str, typer.Option(help="held-out requests")],
    base_url: Annotated[str, typer.Option(help="of an OpenAI-compatible endpoint")],
    model: Annotated[str, typer.Option(help="the judge's name there")],
) -> None:
    """Let a language model compare the student's responses with the references."""
    from promptkd.judge import judge as run_judge

    run_judge(run, data, base_url=base_url, model=model)
    typer.echo(f"verdicts: {run / 'judge'}")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="runs, and directories of other models' scores")
    ],
    output: Annotated[Path | None, typer.Option(help="a single run's own by default")] = None,
) -> None:
    """One self-contained page that says what came of a run, or compares several."""
    from promptkd.report import report as write

    typer.echo(f"report: {write(runs, output)}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="directory of the demonstration")] = Path(
        "runs/demo"
    ),
) -> None:
    """A real teacher, a real student, start to end on this machine, nothing to configure."""
    from promptkd.demo import demo as run

    typer.echo(f"run: {run(output)}")


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
