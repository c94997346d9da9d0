"""How models are asked: a run's own protocol, another evaluation's, or the recipe's defaults."""

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

from promptkd.config import ColumnsSection, Recipe, TeacherSection
from promptkd.data import (
    Encoder,
    Example,
    adopt_chat_template,
    content_digest,
    date_of_run,
    given_rows,
    read_examples,
    template_of_run,
)
from promptkd.errors import UserError
from promptkd.evaluation.metrics import (
    METRICS,
    TEACHER_CROSS_ENTROPY,
    check_metrics,
    of_all_responses,
)
from promptkd.evaluation.results import Evaluation, own_evaluations
from promptkd.evaluation.suites import PAPER_SEEDS, distinct, suite_of_files
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.vllm_engine import lacking_here
from promptkd.given import is_lost
from promptkd.models.loading import digest_of_files, load_tokenizer
from promptkd.models.vocabularies import same_tokenizer
from promptkd.run import Place, TrainedRun, lacks_of_run

OF_QUESTIONS = ("seeds", "num_examples", "teacher", "metrics")
"""What ``Asking`` says of the questions, beside the protocol."""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
Data = Any
"""What ``data.given_rows`` takes, or a mapping of names to such."""


class Asking(TypedDict, total=False):
    """How a model is asked; what is not given is the run's own, or the recipe's default.

    Attributes:
        seeds: of the decoding; one response per request each.
        num_examples: only the first ones of each data set.
        teacher: also measure KL(student || teacher) on the student's responses, in nats per token;
            a name or a loaded model; a run's own if not given and its tokenizer is the student's,
            "" for none.
        metrics: computed beside ROUGE-L and exact match: names of ``metrics.METRICS``,
            ``distinct_N``, ``NAME@K`` for pass@k, or ``module:function``.
        no_repeat_ngram_size: 6 reproduces the authors' test script; 0, the default, blocks nothing.
        precision: auto | bf16 | fp32.
        engine: auto | transformers | vllm; auto: vLLM on a GPU where it is installed.
    """

    seeds: Sequence[int] | None
    num_examples: int | None
    teacher: Any
    metrics: Sequence[str]
    template: str | None
    template_options: Mapping[str, Any] | None
    max_request_tokens: int | None
    max_response_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    no_repeat_ngram_size: int | None
    precision: str | None
    engine: str | None


@dataclass(frozen=True)
class Protocol:
    """How models are asked, complete.

    Attributes:
        teacher: of the run: what its teacher reads.
        teacher_model: the name to load it by.
        run: its directory, if there is one.
    """

    template: str = "auto"
    template_options: Mapping[str, Any] = field(default_factory=dict)
    columns: ColumnsSection = ColumnsSection()
    max_request_tokens: int = 256
    decoding: GenerationSettings = GenerationSettings(256)
    precision: str = "auto"
    engine: str = "auto"
    date: datetime.date | None = None
    teacher: TeacherSection | None = None
    teacher_model: str | None = None
    run: str | None = None

    @property
    def context(self) -> str | None:
        """The column that only the teacher reads."""
        return self.teacher.context if self.teacher else None

    @classmethod
    def of(cls, run: TrainedRun | None, asked: Mapping[str, Any]) -> "Protocol":
        """The run's, if there is one, with what is asked otherwise."""
        own = cls.of_recipe(run.recipe, run.path) if run else cls()
        given: dict[str, Any] = {key: v for key, v in asked.items() if v is not None}
        recorded = (own.template, run.recipe.data.template) if run else (own.template,)
        if given.get("template", own.template) not in recorded:
            own = replace(own, template_options={})  # they belong to the run's own template
        if "max_response_tokens" in given:
            given["max_new_tokens"] = given.pop("max_response_tokens")
        of_decoding = {
            k: given.pop(k) for k in [*given] if k in GenerationSettings.__dataclass_fields__
        }
        return replace(own, decoding=replace(own.decoding, **of_decoding), **given)

    @classmethod
    def of_recipe(cls, recipe: Recipe, run: Path | None = None) -> "Protocol":
        """What a recipe says, and what the run that was made of it recorded."""
        data = recipe.data
        return cls(
            template=template_of_run(run, data.template) if run else data.template,
            template_options=data.template_options,
            columns=data.columns,
            max_request_tokens=data.max_request_tokens,
            decoding=GenerationSettings.of_recipe(recipe),
            precision=recipe.precision,
            engine=recipe.sampling.engine,
            date=date_of_run(run) if run else None,
            teacher=recipe.teacher,
            teacher_model=recipe.teacher_model(run) if recipe.teacher else None,
            run=str(run) if run else None,
        )

    def encoder(self, tokenizer: Any, teacher: str | None = None) -> Encoder:
        """How a model is asked.

        One without a chat template takes, as in training, that of its run or of a ``teacher`` with
        its tokens.
        """
        if self.template in ("auto", "chat") and not tokenizer.chat_template:
            for other in map(load_tokenizer, filter(None, (self.run, teacher))):
                if same_tokenizer(tokenizer, other):
                    adopt_chat_template(tokenizer, other)
        return Encoder(
            tokenizer,
            template=self.template,
            max_request_tokens=self.max_request_tokens,
            max_response_tokens=self.decoding.max_new_tokens,
            template_options=self.template_options,
            date=self.date,
        )


@dataclass(frozen=True)
class Questions:
    """All that models are asked: rows by data set, and how.

    Attributes:
        sources: where the rows are from.
        teacher: with whom the KL is measured; None: the asked run's own, "": nobody.
        metrics: what is computed beside what always is.
    """

    rows: Mapping[str, Sequence[Example]]
    sources: Mapping[str, Sequence[str]]
    protocol: Protocol
    seeds: tuple[int, ...]
    teacher: str | None
    metrics: tuple[str, ...]

    @classmethod
    def of(
        cls,
        data: Data,
        protocol: Protocol,
        *,
        seeds: Sequence[int] | None = None,
        num_examples: int | None = None,
        teacher: str | None = None,
        metrics: Sequence[str] = (),
    ) -> "Questions":
        """Read the data.

        Raises:
            UserError: if it can't be read, or a metric is unknown.
        """
        seeds = distinct(PAPER_SEEDS if seeds is None else seeds)
        check_metrics(metrics, len(seeds))
        if protocol.engine == "auto":
            protocol = replace(protocol, engine="transformers" if lacking_here() else "vllm")
        suite = data if isinstance(data, Mapping) else suite_of_files(given_rows(data, "data"))
        sources = {str(name): given_rows(own, str(name)) for name, own in suite.items()}
        rows = {
            name: read_examples(list(own), protocol.columns, protocol.context)[:num_examples]
            for name, own in sources.items()
        }
        return cls(
            rows=rows,
            sources=sources,
            protocol=protocol,
            seeds=seeds,
            teacher=teacher,
            metrics=tuple(metrics),
        )

    def digests(self, model: str, by_teacher: bool) -> dict[str, str | None]:
        """By data set; equal exactly where the same models would be asked the same of it.

        None where nobody can say: of a model that is an object, or isn't here yet, and of metrics
        that are a user's functions.
        """
        teacher = self.protocol.teacher_model if self.teacher is None else self.teacher
        models = [model, *filter(None, (teacher,))]
        contents = [None if is_lost(m) else digest_of_files(m) for m in models]
        if not all(contents) or any(":" in metric for metric in self.metrics):
            return dict.fromkeys(self.rows)
        briefed = self.protocol.teacher
        texts = [self.protocol.template]
        texts += [briefed.system, briefed.context_template] if briefed else []
        written = [Path(t).read_bytes().hex() for t in texts if t and os.path.isfile(t)]
        versions = [metadata.version(of) for of in ("promptkd", "torch", "transformers")]
        alike = [repr(self.protocol), written, contents, models]
        alike += [self.seeds, self.metrics, by_teacher, versions, torch.cuda.is_available()]
        whole = {name: json.dumps([content_digest(own), *alike]) for name, own in self.rows.items()}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in whole.items()}

    @classmethod
    def like(cls, place: Place, data: Data, asked: Mapping[str, Any]) -> "Questions":
        """Those of an evaluation that was made; what is given here is asked otherwise.

        Args:
            place: a run that was evaluated, or what ``evaluate`` wrote to for a bare model.

        Raises:
            UserError: if there is none, or if its data sets were asked in different ways.
        """
        made = _made(Path(place))
        given = _asked_of(made) | {key: v for key, v in asked.items() if v is not None}
        run = TrainedRun.of(place) if (Path(place) / "recipe.yaml").is_file() else None
        of_questions = {name: given.pop(name) for name in OF_QUESTIONS if name in given}
        protocol = Protocol.of(run, given)
        if protocol.date is None and made[0].date:
            protocol = replace(protocol, date=datetime.date.fromisoformat(made[0].date))
        if data is not None:
            return cls.of(data, protocol, **of_questions)
        questions = cls.of({own.name: own.data for own in made}, protocol, **of_questions)
        sizes = {own.name: own.num_examples for own in made}
        rows = {name: own[: sizes[name]] for name, own in questions.rows.items()}
        return replace(questions, rows=rows)


def _made(place: Path) -> list[Evaluation]:
    directory = place / "evaluation" if (place / "evaluation").is_dir() else place
    made = own_evaluations(directory)
    if not made:
        lacking = lacks_of_run(place) or "it was not evaluated"
        raise UserError(
            f"{place} holds no evaluation to follow: {lacking}. Or name what promptkd evaluate "
            "wrote to."
        )
    ways = {str(own.settings() | {"num_examples": 0}) for own in made}
    if len(ways) > 1:
        raise UserError(
            f"{place} was evaluated in {len(ways)} ways ({', '.join(own.name for own in made)}): "
            "other lengths, seeds or decoding. Evaluate its data sets alike first."
        )
    return made


def _asked_of(made: Sequence[Evaluation]) -> dict[str, Any]:
    """What was asked for when these were made, as ``Asking`` has it."""
    first = made[0]
    names = dict.fromkeys(name for own in made for name in own.scores)
    known = {*METRICS, TEACHER_CROSS_ENTROPY}
    decoding = {k: v for k, v in first.decoding.items() if k in Asking.__annotations__}
    return decoding | {
        "seeds": first.seeds,
        "teacher": first.teacher,
        "metrics": [n for n in names if n in known or ":" in n or of_all_responses(n)],
        "template": first.template,
        "max_request_tokens": first.max_request_tokens,
        "max_response_tokens": first.decoding["max_new_tokens"],
        "precision": PRECISIONS.get(first.dtype, "auto"),
    }
