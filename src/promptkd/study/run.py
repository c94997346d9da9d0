"""Methods x seeds: every run trained and scored alike, then one table. Resumable."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from promptkd.api import train
from promptkd.bars import progress_bar
from promptkd.composition import Method
from promptkd.config import SamplingSection
from promptkd.data import Example, read_examples
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import evaluate
from promptkd.evaluation.results import Evaluation, own_evaluations
from promptkd.files import write_text
from promptkd.generation.sampling import GenerationSettings
from promptkd.methods import build_method
from promptkd.models.loading import default_device, load_tokenizer
from promptkd.models.vocabularies import same_tokenizer
from promptkd.ranks import ALONE
from promptkd.study.file import PlannedRun, Study, planned_runs
from promptkd.study.stored import conclude, keep
from promptkd.study.table import Failure
from promptkd.training.run_directory import RunDirectory
from promptkd.training.setup import set_up

Scores = dict[str, Evaluation]
"""Of one model, by data set."""


def run_study(study: Study) -> Path:
    """Train and score what isn't yet; print and write the table and the report.

    Returns:
        The study's directory, with study.json, table.md, table.tex and report.html.

    Raises:
        UserError: before the first step, for everything that is known to be wrong in any run; at
            the end, when all is written, if runs failed.
    """
    _refuse_several_processes(study)
    runs, base, output = planned_runs(study), study.base_recipe, Path(study.output)
    methods = _checked_methods(runs)
    scorer = StudyScorer(study)
    _rehearse(runs, methods)
    _write_recipes(runs)
    models = {"start": base.student.model}
    if base.teacher:
        models["teacher"] = base.teacher_model()
    total = len(models) + len(runs)
    for number, (role, model) in enumerate(models.items(), start=1):
        typer.echo(f"{number} of {total}: scores of the {role}, {model}")
        scorer.score(model, output / role, teacher=role == "start")
        keep(study, output / role, output / role)
    failed = []
    for number, run in enumerate(runs, start=len(models) + 1):
        typer.echo(f"{number} of {total}: {run.name}, in {run.recipe.output}")
        try:
            directory = train(run.recipe, methods[run.label]).path
            scorer.score(str(directory), directory / "evaluation", teacher=True)
            keep(study, directory, directory / "evaluation")
        except UserError as error:
            typer.echo(f"{run.name} failed, the study goes on: {error}", err=True)
            failed.append(Failure(run.label, run.seed, str(error)))
    page = conclude(study, failed=failed)
    typer.echo(f"\nreport: {page}")
    _refuse_failures(failed, len(runs), study.place)
    return study.place


class StudyScorer:
    """Scores every model of a study under the same settings, each only once.

    Raises:
        UserError: if a data set can't be read.
    """

    def __init__(self, study: Study):
        self._asked = study.evaluation
        self._base = base = study.base_recipe
        self._rows: dict[str, Sequence[Example]] = {
            name: read_examples(sources, base.data.columns)[: self._asked.num_examples]
            for name, sources in self._asked.suite.items()
        }
        self._teacher = ""
        if base.teacher:
            tokenizers = load_tokenizer(base.student.model), load_tokenizer(base.teacher_model())
            if same_tokenizer(*tokenizers):
                self._teacher = base.teacher_model()

    def score(self, model: str, directory: Path, *, teacher: bool) -> Scores:
        """Evaluate on every data set that ``directory`` has no scores of, and give all of them.

        Args:
            model: a run's directory or a model's name.
            teacher: measure the KL to the base's teacher, if it has the student's tokenizer.
        """
        asked, data, sampling = self._asked, self._base.data, self._base.sampling
        other = self._teacher if teacher else ""
        made = self._made(model, directory, other)
        missing = {name: own for name, own in asked.suite.items() if name not in made}
        if not missing:
            return made
        evaluate(
            model,
            missing,
            seeds=asked.seeds,
            num_examples=asked.num_examples,
            template=data.template,
            max_request_tokens=data.max_request_tokens,
            max_response_tokens=data.longest_response,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            no_repeat_ngram_size=asked.no_repeat_ngram_size,
            metrics=asked.metrics,
            teacher=other,
            precision=self._base.precision,
            engine=sampling.engine,
            output=directory,
        )
        return self._made(model, directory, other)

    def _made(self, model: str, directory: Path, teacher: str) -> Scores:
        """What was evaluated after its training, with these settings, on these rows."""
        asked, data = self._asked, self._base.data
        decoding = replace(
            GenerationSettings.of_recipe(self._base),
            no_repeat_ngram_size=asked.no_repeat_ngram_size,
        )
        settings: dict[str, Any] = {
            "model": model,
            "teacher": teacher or None,
            "template": data.template,
            "max_request_tokens": data.max_request_tokens,
            "decoding": decoding.to_dict(),
            "seeds": tuple(asked.seeds),
        }
        trained = Path(model) / "summary.json"
        made = {}
        for found in own_evaluations(directory):
            rows, written = self._rows.get(found.name, ()), directory / f"{found.name}.json"
            sources = tuple(asked.suite.get(found.name, ()))
            expected = settings | {"data": sources, "num_examples": len(rows)}
            references = {row.index: row.references for row in found.predictions}
            if (
                not found.num_lost
                and all(getattr(found, key) == value for key, value in expected.items())
                and references == {i: row.responses for i, row in enumerate(rows)}
                and not (trained.is_file() and _time(written) < _time(trained))
            ):
                made[found.name] = found.also_scored_by(asked.metrics)
        return made


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _checked_methods(runs: Sequence[PlannedRun]) -> dict[str, Method]:
    """Every method, built, after checking that each run's directory is free or its own."""
    methods = {}
    for run in runs:
        section = run.recipe.method
        try:
            methods[run.label] = build_method(section.name, **section.options)
        except UserError as error:
            raise UserError(f"methods.{run.label}: {error}") from None
    for run in runs:
        try:
            RunDirectory(run.recipe, methods[run.label])
        except UserError as error:
            raise UserError(
                f"{run.name}: {error} Or give the method as it is now another label, so that both "
                "stand in the table."
            ) from None
    return methods


def _refuse_failures(failed: Sequence[Failure], num_runs: int, output: Path) -> None:
    if failed:
        names = ", ".join(f"{failure.label} seed {failure.seed}" for failure in failed)
        raise UserError(
            f"{len(failed)} of {num_runs} runs failed: {names}. Their reasons stand below the "
            f"table, in {output}. The same command tries them again; to change a method, remove "
            "its directory first, or give it another label."
        )


def _refuse_several_processes(study: Study) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A study runs in one process, one run after the other. To train its runs on several, "
            "start 'promptkd study' alone first: it writes the recipe of each beside its "
            f"directory ({study.output}/LABEL/seed-N.yaml); train those, and start it again."
        )


def _rehearse(runs: Sequence[PlannedRun], methods: Mapping[str, Method]) -> None:
    """All that a run checks before its first step, once per method that isn't through."""
    device = default_device()
    left = {}  # the first run of each method that has one to do
    for run in runs:
        if not RunDirectory(run.recipe, methods[run.label]).finished:
            left.setdefault(run.label, run)
    with progress_bar(left.items(), desc="checking methods", unit="method") as shown:
        for label, run in shown:
            transformers = {**run.recipe.sampling.model_dump(), "engine": "transformers"}
            sampling = SamplingSection(**transformers)  # another engine takes a minute
            recipe = run.recipe.model_copy(update={"sampling": sampling})
            try:
                set_up(recipe, methods[label], device, ALONE, lambda sentence: None)
            except UserError as error:
                raise UserError(f"methods.{label}: {error}") from None


def _write_recipes(runs: Sequence[PlannedRun]) -> None:
    """Beside the runs' directories, so that any of them can be trained elsewhere."""
    for run in runs:
        directory = Path(run.recipe.output)
        write_text(directory.with_name(f"{directory.name}.yaml"), run.recipe.to_yaml())
