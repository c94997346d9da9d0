"""Commands that measure what came of a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from promptkd.cli.app import app, keep_freed_memory
from promptkd.errors import UserError


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a run's directory, or any model")],
    data: Annotated[
        list[str] | None, typer.Option(help="held-out requests; each file is scored by itself")
    ] = None,
    suite: Annotated[Path | None, typer.Option(help="or a YAML file of named data sets")] = None,
    like: Annotated[
        Path | None, typer.Option(help="or an evaluated run: its data and its whole protocol")
    ] = None,
    with_: Annotated[
        str | None,
        typer.Option(
            "--with", help="a run's other models too: start,teacher,warm-up", show_default=False
        ),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(min=0, help="decoding seeds")] = None,
    output: Annotated[Path | None, typer.Option(help="directory for the scores")] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="only the first ones")] = None,
    template: Annotated[str | None, typer.Option(help="as data.template in a recipe")] = None,
    max_request_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_response_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1)] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(min=0, help="6 as the authors' test script")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto | transformers | vllm")] = None,
    teacher: Annotated[str | None, typer.Option(help="also measure KL(student || teacher)")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="more scores: docs/metrics.md")] = None,
) -> None:
    """Write responses to held-out requests, score them, and save both."""
    options = dict(locals())
    for name in ("model", "data", "suite", "with_", "metric"):
        del options[name]
    _check_sources(data, suite, like)
    if engine not in (None, "auto", "transformers", "vllm"):
        raise UserError(f"--engine is '{engine}'; known: auto, transformers, vllm.")
    if metric:
        options["metrics"] = metric
    found = _evaluated(model, (with_ or "").split(","), _sources(data, suite), options)
    if found is not None:
        typer.echo(found)
        typer.echo(f"scores: {output or _run_of(Path(model)) / 'evaluation'}")


def _check_sources(data: list[str] | None, suite: Path | None, like: Path | None) -> None:
    if (suite is not None) + bool(data) > 1 or not (suite or data or like):
        raise UserError(
            "Say what to evaluate on: either --data FILE ... or --suite FILE, or --like RUN."
        )


def _sources(data: list[str] | None, suite: Path | None) -> Any:
    """Files by data set; None where another evaluation says it."""
    from promptkd.evaluation.suites import read_suite, suite_of_files

    if suite:
        return read_suite(suite)
    return suite_of_files(data) if data else None


def _evaluated(model: str, others: list[str], sources: Any, options: dict[str, Any]) -> Any:
    """The scores; None on processes that only help."""
    from promptkd.evaluation.evaluate import evaluate as run
    from promptkd.evaluation.evaluate import evaluate_with
    from promptkd.ranks import Ranks

    keep_freed_memory()
    ranks = Ranks.of_launch()
    if any(others):
        found: Any = evaluate_with(model, others, sources, ranks=ranks, **options)
    else:
        found = run(model, sources, ranks=ranks, **options)
    return found if ranks.rank == 0 else None


def _run_of(directory: Path) -> Path:
    from promptkd.evaluation.named_models import run_of

    return run_of(directory).path


@app.command("lm-eval")
def lm_eval(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    tasks: Annotated[list[str], typer.Option(help="names of the harness, or YAML files of tasks")],
    with_: Annotated[
        str | None, typer.Option("--with", help="the run's other models too: start,teacher")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first of each task")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="else the task's own")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    precision: Annotated[str, typer.Option(help="auto | bf16 | fp32")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="by the chat template")] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a run's student; the table stays in the run."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision is '{precision}'; known: auto, bf16, fp32.")
    from promptkd.evaluation.lm_harness import lm_eval as evaluate_tasks

    keep_freed_memory()
    found = evaluate_tasks(
        run,
        tasks,
        others=with_.split(",") if with_ else (),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        precision=precision,
        chat=chat,
    )
    typer.echo(found)
    typer.echo(f"results: {_run_of(run) / 'lm_eval'}")


@app.command()
def rescore(
    directory: Annotated[Path, typer.Argument(help="a run, or what evaluate wrote to")],
) -> None:
    """Compute ROUGE-L and the like anew from the kept predictions, without generating again."""
    from promptkd.evaluation.rescoring import rescore as run

    notes: list[str] = []
    typer.echo(run(directory, notes))
    for note in notes:
        typer.echo(f"warning: {note}", err=True)
    typer.echo(f"scores: {directory}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="a run, or another model's scores")],
    second: Annotated[Path, typer.Argument(help="what it is compared with")],
) -> None:
    """Paired bootstrap of two evaluations on the same requests."""
    from promptkd.evaluation.comparison import compare as run

    typer.echo(run(first, second))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    request: Annotated[str, typer.Argument(help="the instruction")],
    input: Annotated[str, typer.Option(help="its context")] = "",
    context: Annotated[str, typer.Option(help="what only the run's teacher reads")] = "",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy")] = None,
) -> None:
    """Teacher, adapted teacher and student side by side on one request."""
    from promptkd.evaluation.side_by_side import generate as respond

    asked: dict[str, Any] = {"input": input, "context": context, "temperature": temperature}
    typer.echo(respond(run, request, seed=seed, **asked))
    typer.echo(f"run: {run}")


@app.command("exposure-bias")
def exposure_bias(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    data: Annotated[
        list[str] | None, typer.Option(help="requests; the run's validation data if not given")
    ] = None,
    num_examples: Annotated[int, typer.Option(min=1, help="only the first ones")] = 500,
    num_samples: Annotated[
        int, typer.Option(min=1, help="responses per request, seed and author")
    ] = 1,
    seeds: Annotated[list[int] | None, typer.Option(min=0, help="of the sampling")] = None,
    max_response_tokens: Annotated[
        int | None, typer.Option(min=1, help="else the run's own")
    ] = None,
    precision: Annotated[str, typer.Option(help="auto | bf16 | fp32")] = "fp32",
    authors_script: Annotated[
        bool, typer.Option(help="the authors' script, defects included, in a file of its own")
    ] = False,
) -> None:
    """Measure R(l), E(l) and ExAccErr(l) of a run's student against its plain teacher."""
    from promptkd.evaluation.exposure_bias import exposure_bias as measure

    keep_freed_memory()
    result = measure(
        run,
        data,
        num_examples=num_examples,
        num_samples=num_samples,
        seeds=seeds or (10, 20, 30),
        max_new_tokens=max_response_tokens,
        precision=precision,
        authors_script=authors_script,
    )
    typer.echo(result)
    name = "exposure_bias_authors_script" if authors_script else "exposure_bias"
    typer.echo(f"exposure bias: {run / name}.json")


@app.command("analyse-prompt")
def analyse_prompt(
    run: Annotated[Path, typer.Argument(help="a finished run's directory")],
    data: Annotated[
        list[str] | None, typer.Option(help="requests; the run's validation data if not given")
    ] = None,
    num_examples: Annotated[
        int, typer.Option(min=1, help="of training and held-out data each")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="of the responses")] = 10,
    precision: Annotated[str, typer.Option(help="auto | bf16 | fp32")] = "fp32",
) -> None:
    """Where the soft prompt went, and what the teacher says differently for it."""
    from promptkd.evaluation.prompt_analysis import prompt_analysis

    keep_freed_memory()
    result = prompt_analysis(run, data, num_examples=num_examples, seed=seed, precision=precision)
    typer.echo(result)
    typer.echo(f"prompt analysis: {run / 'prompt_analysis.json'}")


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="a run's directory")],
    data: Annotated[str, typer.Option(help="held-out requests, as given to evaluate")],
    base_url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint, up to /v1")],
    model: Annotated[str, typer.Option(help="the judge's name there")],
    protocol: Annotated[str, typer.Option(help="score (the paper's) | pairwise")] = "score",
    against: Annotated[Path | None, typer.Option(help="another run, for pairwise")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="decoding seeds of the responses")] = None,
    num_examples: Annotated[int | None, typer.Option(min=1, help="only the first ones")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="the judge's")] = 0.7,
    max_reply_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    max_reasks: Annotated[int, typer.Option(min=0, help="per malformed reply")] = 2,
    max_concurrency: Annotated[int, typer.Option(min=1, help="questions at a time")] = 4,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for one answer")] = 60.0,
    max_retries: Annotated[int, typer.Option(min=0, help="after a 429, 5xx or timeout")] = 4,
    api_key_variable: Annotated[
        str, typer.Option(help="environment variable that holds the key")
    ] = "OPENAI_API_KEY",
    output: Annotated[Path | None, typer.Option(help="directory; RUN/judge without it")] = None,
) -> None:
    """Let a language model judge a run's responses, on any OpenAI-compatible endpoint."""
    from promptkd.judge.judge import judge as work

    result = work(
        run,
        data,
        against=against,
        seeds=seeds,
        num_examples=num_examples,
        output=output,
        base_url=base_url,
        model=model,
        protocol=protocol,
        temperature=temperature,
        max_reply_tokens=max_reply_tokens,
        max_reasks=max_reasks,
        max_concurrency=max_concurrency,
        timeout=timeout,
        max_retries=max_retries,
        api_key_variable=api_key_variable,
    )
    _show_judgements(result, output or run / "judge")


def _show_judgements(result: dict[str, Any], place: Path) -> None:
    typer.echo(result)
    typer.echo(f"judgements: {place}")
    if result["scores"] is None:
        raise UserError(
            f"None of the judge's {result['counts']['malformed']} replies was in the form asked "
            "for, so there is no score. Use a stronger judge, or raise --max-reply-tokens."
        )


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="runs, and directories of other models' scores")
    ],
    output: Annotated[Path | None, typer.Option(help="a single run's own by default")] = None,
) -> None:
    """One self-contained page that says what came of a run, or compares several."""
    from promptkd.report.report import report as write

    typer.echo(f"report: {write(runs, output)}")
