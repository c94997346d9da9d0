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
from promptkd.data import date_of_run, reads
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import answer
from promptkd.evaluation.exposure_bias import exposure_bias
from promptkd.evaluation.kept import kept_evaluation
from promptkd.evaluation.protocol import Protocol, Questions
from promptkd.evaluation.results import Evaluation, own_evaluations
from promptkd.files import write_text
from promptkd.generation.vllm_engine import expect_several
from promptkd.methods import build_method
from promptkd.models.loading import default_device, load_tokenizer
from promptkd.models.vocabularies import same_tokenizer
from promptkd.ranks import ALONE
from promptkd.study.exposure import FILE as EXPOSURE_BIAS
from promptkd.study.exposure import measured
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
    expect_several()
    runs, base, output = planned_runs(study), study.base_recipe, Path(study.output)
    methods = _checked_methods(runs)
    scorer = StudyScorer(study)
    if study.evaluation.exposure_bias and not scorer.teacher:
        raise UserError(
            "'evaluation.exposure_bias': the base has no teacher with the student's tokenizer, to "
            "whose text the student's own could be compared. Take it out."
        )
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
            _measure_exposure(study, directory)
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

    Attributes:
        teacher: whom a KL is measured to; empty without one that has the student's tokenizer.

    Raises:
        UserError: if a data set can't be read, or a metric is unknown.
    """

    def __init__(self, study: Study):
        base, asked = study.base_recipe, study.evaluation
        protocol = Protocol.of_recipe(base)
        decoding = replace(
            protocol.decoding,
            no_repeat_ngram_size=asked.no_repeat_ngram_size,
            max_new_tokens=asked.max_response_tokens or protocol.decoding.max_new_tokens,
        )
        most = asked.max_request_tokens or protocol.max_request_tokens
        self._questions = Questions.of(
            asked.suite,
            replace(protocol, decoding=decoding, max_request_tokens=most),
            seeds=asked.seeds,
            num_examples=asked.num_examples,
            metrics=asked.metrics,
        )
        self.teacher = ""
        if base.teacher:
            tokenizers = load_tokenizer(base.student.model), load_tokenizer(base.teacher_model())
            if same_tokenizer(*tokenizers):
                self.teacher = base.teacher_model()

    def score(self, model: str, directory: Path, *, teacher: bool) -> Scores:
        """Evaluate on every data set that ``directory`` has no scores of, and give all of them.

        Args:
            model: a run's directory or a model's name.
            teacher: measure the KL to the base's teacher, if it has the student's tokenizer.
                Without it the model is that teacher, and reads what it teaches with, if the data
                have it.
        """
        whole, protocol = self._questions, self._questions.protocol
        if (run := Path(model) / "recipe.yaml").is_file():
            protocol = replace(protocol, date=date_of_run(run.parent), run=model)
        name = self.teacher if teacher else ""
        questions = replace(whole, protocol=protocol, teacher=name)
        informed = all(reads(own, protocol.context) for own in whole.rows.values())
        by_teacher = informed and not teacher
        made = self._made(model, directory, questions, by_teacher)
        rows = {name: own for name, own in whole.rows.items() if name not in made}
        if not rows:
            return made
        answer(model, replace(questions, rows=rows), directory, by_teacher=by_teacher)
        return self._made(model, directory, questions, by_teacher)

    def _made(self, model: str, directory: Path, questions: Questions, by_teacher: bool) -> Scores:
        """What was evaluated with these settings, on these rows, and is the model's as it is.

        That is, after its training, or of the very files that are there.
        """
        protocol = questions.protocol
        encoder = protocol.encoder(load_tokenizer(model), questions.teacher)
        settings: dict[str, Any] = {
            "model": model,
            "template": encoder.template,
            "max_request_tokens": protocol.max_request_tokens,
            "decoding": protocol.decoding.to_dict(),
            "seeds": tuple(questions.seeds),
        }
        trained = Path(model) / "summary.json"
        made = {}
        for found in own_evaluations(directory):
            rows, written = questions.rows.get(found.name, ()), directory / f"{found.name}.json"
            expected = settings | {
                "data": tuple(questions.sources.get(found.name, ())),
                "num_examples": len(rows),
                "teacher": (reads(rows, protocol.context) and questions.teacher) or None,
            }
            references = {row.index: row.references for row in found.predictions}
            if (
                not found.num_lost
                and all(getattr(found, key) == value for key, value in expected.items())
                and references == {i: encoder.references(row) for i, row in enumerate(rows)}
                and (
                    not trained.is_file()
                    or _time(written) >= _time(trained)
                    or kept_evaluation(written, questions.digests(model, by_teacher)[found.name])
                )
            ):
                made[found.name] = found.also_scored_by(questions.metrics)
        return made


def _measure_exposure(study: Study, run: Path) -> None:
    """Exposure bias, if the study asks for it and it isn't known since the run's training."""
    asked = study.evaluation.exposure_bias
    if asked is None or (
        measured(run, study) and _time(run / EXPOSURE_BIAS) >= _time(run / "summary.json")
    ):
        return
    exposure_bias(
        run,
        study.evaluation.suite[asked.data],
        num_examples=asked.num_examples,
        seeds=asked.seeds,
        precision=asked.precision,
    )


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
            plain = {"engine": "transformers", "vllm": {}}  # another engine takes a minute
            sampling = run.recipe.sampling.model_copy(update=plain)
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
