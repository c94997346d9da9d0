"""Scoring a run's student, or any model, on held-out requests.

A score always carries its data, decoding settings, seeds, number of examples and interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from tqdm.auto import tqdm

from promptkd.data import Encoder, Example, evaluation_set, reads
from promptkd.errors import UserError
from promptkd.evaluation.kept import kept_evaluation, refuse_to_replace, save_evaluation
from promptkd.evaluation.named_models import named_models, run_of
from promptkd.evaluation.protocol import OF_QUESTIONS, Asking, Data, Protocol, Questions
from promptkd.evaluation.records import Scores, ScoresByData, ScoresByModel
from promptkd.evaluation.results import Evaluation
from promptkd.evaluation.scorer import Scorer
from promptkd.evaluation.size_and_speed import size_and_speed
from promptkd.files import check_place
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.generation.vllm_engine import VLLMEngine, expect_several
from promptkd.given import is_lost, same
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import check_context, load_tokenizer, stop_ids
from promptkd.models.objects import given_model
from promptkd.models.vocabularies import load_pair, same_tokenizer
from promptkd.ranks import ALONE, Ranks
from promptkd.run import Place, TrainedRun, lacks_of_run


def evaluate(
    run_or_model: Any,
    data: Data = None,
    *,
    like: Place | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    ranks: Ranks = ALONE,
    **asked: Unpack[Asking],
) -> Scores | ScoresByData:
    """Score a run's student, or any model, on held-out requests, and save scores and responses.

    Args:
        run_or_model: a run or its directory, a model's name as ``load_model`` takes it, or a
            loaded causal language model, which isn't changed.
        data: path, glob or hub id; several are scored one by one, each under its own name. From
            Python also lists of dictionaries and ``datasets.Dataset``. A mapping of names to such
            is a suite; a list of paths in it makes one data set.
        like: a run that was evaluated, or what another ``evaluate`` wrote to: the same data,
            template, lengths, decoding, seeds, precision, metrics and teacher, where not given.
        output: directory; ``RUN/evaluation`` by default, needed for a bare model's name. Of a
            model that came as an object nothing is written without it.
        tokenizer: of the models that are objects; else the one that lies where they came from.
        ranks: the processes that share the requests; every one of them calls this.
        asked: seeds, metrics, template, lengths, sampling and more: see ``Asking``.

    Returns:
        What ``NAME.json`` holds, NAME being the data's, with ``predictions``; for several, that
        of each by name.

    Raises:
        UserError: if the data or model can't be read.
    """
    model, run = given_model(run_or_model, tokenizer, "the model"), _run(run_or_model, output)
    questions = _questions(run, data, like, _with_named_teacher(asked, tokenizer))
    place = None if output is None else Path(output)
    if run and place is None:
        place = run.path / "evaluation"
    results = answer(model, questions, place, ranks=ranks)
    return next(iter(results.values())) if is_one(data) else results


def evaluate_with(
    run: Place,
    others: Sequence[str],
    data: Data = None,
    *,
    like: Place | None = None,
    output: str | Path | None = None,
    ranks: Ranks = ALONE,
    **asked: Unpack[Asking],
) -> ScoresByModel:
    """Score a run's student, and models that belong to it, by the run's protocol.

    Args:
        run: itself, its directory, or that of ``distill``.
        others: ``start``, ``teacher`` (which reads what it taught with), or, where ``distill``
            made the run, any model that it scores (``warm-up``).
        data: see ``evaluate``, as is the rest. The others' scores go to ``RUN/evaluation/OTHER``.

    Returns:
        The records of each data set: of the student by "student", of each other by its name.

    Raises:
        UserError: for a name that the run doesn't know, and as ``evaluate``.
    """
    expect_several()
    own = run_of(run)
    models = named_models(own, others)
    questions = _questions(_run(own, None), data, like, _with_named_teacher(asked, None))
    place = Path(output) if output is not None else own.path / "evaluation"
    results = ScoresByModel(student=answer(str(own.path), questions, place, ranks=ranks))
    for label, model in models.items():
        by_teacher = label == "teacher"
        results[label] = answer(model, questions, place / label, by_teacher=by_teacher, ranks=ranks)
    return results


def answer(
    model: str,
    questions: Questions,
    output: Path | None,
    *,
    by_teacher: bool = False,
    ranks: Ranks = ALONE,
) -> ScoresByData:
    """Load a model, let it answer, and save what came of it, if there is a place for it.

    What is there already, of the same model on the same questions, isn't done again.
    ``by_teacher``: the model is the run's teacher, and reads what it taught with.

    Raises:
        UserError: if that is a column which the data lack.
    """
    kept, asked = _kept(model, questions, output, by_teacher)
    if len(kept) == len(questions.rows):
        return ScoresByData({name: kept[name] for name in questions.rows})
    loaded = _load(model, questions, by_teacher)
    results, measured = ScoresByData(), {}
    for name, rows in questions.rows.items():
        if name in kept:
            results[name] = kept[name]
            continue
        readable = _as_readable(loaded, name, rows, questions.protocol.context)
        evaluation = _evaluation(model, readable, name, questions, measured, ranks)
        measured = evaluation.size_and_speed
        evaluation = replace(evaluation, asked=asked[name] or "")
        if output and ranks.rank == 0:
            save_evaluation(output, evaluation)
        results[name] = Scores.of(evaluation)
    return results


def _kept(
    model: str, questions: Questions, output: Path | None, by_teacher: bool
) -> tuple[dict[str, Scores], dict[str, str | None]]:
    """The evaluations that are there already, and the digest of every data set's questions.

    Raises:
        UserError: before any work, if there is no place for what would be found out.
    """
    if output is None:
        return {}, dict.fromkeys(questions.rows)
    check_place(output)
    kept, asked = {}, questions.digests(model, by_teacher)
    for name, rows in questions.rows.items():
        place = output / f"{name}.json"
        if (found := kept_evaluation(place, asked[name])) is not None:
            tqdm.write(f"{name}: was evaluated so before; remove {place} to do it again")
            kept[name] = Scores.of(found)
        else:
            refuse_to_replace(place, len(rows) * len(questions.seeds))
    return kept, asked


def _evaluation(
    model: str,
    asked: "Loaded",
    name: str,
    questions: Questions,
    measured: Mapping[str, Any],
    ranks: Ranks,
) -> Evaluation:
    """Responses to one data set, and their scores; size and speed are measured once a model."""
    scorer = asked.scorer(questions.rows[name], questions, ranks)
    engine, seeds = asked.engine, questions.seeds
    with scorer.bar(engine, f"responses to {name}", len(seeds)):
        scores, predictions = scorer.score(engine, asked.student, asked.teacher, seeds)
    requests = [e.request_of(asked.is_briefed) for e in scorer.data.examples]
    measured = measured or size_and_speed(
        model,
        asked.student,
        requests,
        questions.protocol.decoding,
        {questions.protocol.engine: engine},
    )
    if ranks.rank == 0:
        tqdm.write(f"{name}: {scorer.data.summary()}")
    return Evaluation(
        name=name,
        model=model,
        data=tuple(questions.sources[name]),
        seeds=seeds,
        size_and_speed=dict(measured),
        scores=scores,
        predictions=tuple(predictions),
        **asked.settings(scorer),
    )


@dataclass(frozen=True)
class Loaded:
    """The model that answers, and the teacher that it is compared with.

    Attributes:
        briefed: how the teacher is asked, if it reads other requests than the student.
        by_teacher: the model that answers is that teacher.
    """

    student: LanguageModel
    tokenizer: Any
    encoder: Encoder
    engine: Engine
    stop: Sequence[int]
    teacher: LanguageModel | None
    teacher_name: str | None
    briefed: Encoder | None
    by_teacher: bool

    @property
    def is_briefed(self) -> bool:
        """Whether the model that answers reads other requests than the student."""
        return self.by_teacher and self.briefed is not None

    def scorer(self, rows: Sequence[Example], questions: Questions, ranks: Ranks) -> Scorer:
        return Scorer(
            data=evaluation_set(rows, self.encoder, self.briefed),
            tokenizer=self.tokenizer,
            stop=self.stop,
            decoding=questions.protocol.decoding,
            ranks=ranks,
            metrics=questions.metrics,
            by_teacher=self.is_briefed,
        )

    def settings(self, scorer: Scorer) -> dict[str, Any]:
        """How it was asked, as an evaluation records it."""
        return {
            "teacher": self.teacher_name,
            "num_examples": len(scorer.data),
            "num_cut_requests": scorer.data.num_cut_requests,
            "template": self.encoder.template,
            "max_request_tokens": self.encoder.max_request_tokens,
            "date": self.encoder.date.isoformat(),
            "decoding": scorer.decoding.to_dict(),
            "dtype": str(self.student.dtype).removeprefix("torch."),
        }


def _as_readable(loaded: Loaded, name: str, rows: Sequence[Example], column: str | None) -> Loaded:
    """Without a teacher to compare with, where the data lack the column that only it reads.

    Raises:
        UserError: if it is the teacher itself that answers.
    """
    if not loaded.briefed or reads(rows, column):
        return loaded
    if loaded.by_teacher:
        raise UserError(
            f"{name} has no '{column}', which the teacher reads. Score the teacher on data that "
            "have it, or without it as a model: evaluate MODEL --like RUN."
        )
    tqdm.write(f"{name} has no '{column}': no KL to the teacher, which reads it")
    return replace(loaded, teacher=None, teacher_name=None, briefed=None)


def _load(model: str, questions: Questions, by_teacher: bool) -> Loaded:
    tokenizer, protocol = load_tokenizer(model), questions.protocol
    teacher_name = _teacher(model, questions, tokenizer)
    encoder = protocol.encoder(tokenizer, teacher_name)
    student, teacher = load_pair(model, teacher_name, tokenizer, protocol.precision)
    limits = encoder.max_request_tokens, encoder.max_response_tokens
    check_context(student.module.config, *limits, model)
    stop = sorted({*stop_ids(tokenizer, student.module), encoder.eos_token_id})
    return Loaded(
        student=student,
        tokenizer=tokenizer,
        encoder=encoder,
        engine=_engine(protocol, student, stop),
        stop=stop,
        teacher=teacher,
        teacher_name=teacher_name,
        briefed=_teacher_encoder(protocol, model if by_teacher else teacher_name, encoder),
        by_teacher=by_teacher,
    )


def _with_named_teacher(asked: Asking, tokenizer: Any) -> dict[str, Any]:
    given: dict[str, Any] = dict(asked)
    if given.get("teacher") is not None:
        given["teacher"] = given_model(given["teacher"], tokenizer, "teacher")
    return given


def is_one(data: Data) -> bool:
    """Whether this is one data set, to which no name is given."""
    if isinstance(data, (list, tuple)):
        return isinstance(data[0], Mapping)
    return data is not None and not isinstance(data, Mapping)


def _questions(
    run: TrainedRun | None, data: Data, like: Place | None, given: dict[str, Any]
) -> Questions:
    if like is not None:
        return Questions.like(like, data, given)
    if data is None:
        raise UserError("Say what to evaluate on: data, or an evaluation to follow.")
    of_questions = {name: given.pop(name) for name in OF_QUESTIONS if name in given}
    return Questions.of(data, Protocol.of(run, given), **of_questions)


def _teacher(model: str, questions: Questions, tokenizer: Any) -> str | None:
    """Who was asked for, or the run's own if the KL to it is defined; nobody for itself."""
    asked, own = questions.teacher, questions.protocol.teacher_model
    if asked is None and own and is_lost(own):
        tqdm.write(f"no KL to the run's teacher, '{own}': it isn't here; give it as teacher=...")
        return None
    if asked is None and own:
        asked = own if same_tokenizer(tokenizer, load_tokenizer(own)) else ""
    return None if asked and same(asked, model) else asked or None


def _teacher_encoder(protocol: Protocol, name: str | None, encoder: Encoder) -> Encoder | None:
    """How the run's own teacher is asked, if it reads other requests than the student."""
    own = protocol.teacher_model
    if protocol.teacher is None or name is None or own is None or not same(own, name):
        return None
    return encoder.for_teacher(protocol.teacher, load_tokenizer(name))


def _engine(protocol: Protocol, student: LanguageModel, stop: Sequence[int]) -> Engine:
    if protocol.engine == "vllm":
        limits = protocol.max_request_tokens + protocol.decoding.max_new_tokens
        return VLLMEngine(student, stop, limits, learns=False)
    return TransformersEngine(student, stop)


def _run(run_or_model: Any, output: str | Path | None) -> TrainedRun | None:
    """The run that it is; None for a bare model, whose name then needs an output."""
    if not isinstance(run_or_model, (str, PathLike)):
        return None
    if (Path(run_or_model) / "recipe.yaml").is_file():
        return TrainedRun.finished(run_or_model)
    if output is None:
        raise UserError(
            f"{run_or_model} is not a run: {lacks_of_run(Path(run_or_model))}; or, if it is a "
            "model, say where its scores go: --output DIR."
        )
    return None
