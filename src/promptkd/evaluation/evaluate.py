"""Scoring a run's student, or any model, on held-out requests.

A score always carries its data, decoding settings, seeds, number of examples and interval.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from tqdm import tqdm

from promptkd.config import ColumnsSection, Recipe, load_recipe
from promptkd.data import Encoder, date_of_run, evaluation_set, read_examples
from promptkd.errors import UserError
from promptkd.evaluation.metrics import check_metrics
from promptkd.evaluation.results import Evaluation, save_evaluation
from promptkd.evaluation.scorer import Scorer
from promptkd.evaluation.suites import PAPER_SEEDS, listed, suite_of_files
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.loading import (
    check_context,
    load_tokenizer,
    stop_ids,
)
from promptkd.models.vocabularies import load_pair, same_tokenizer


class Asked(TypedDict, total=False):
    """How a model is asked; what is not given is the run's own, or the recipe's default.

    ``no_repeat_ngram_size`` 6 reproduces the authors' test script; 0, the default, blocks nothing.
    ``precision`` is auto | bf16 | fp32.
    """

    template: str | None
    template_options: Mapping[str, Any] | None
    max_request_tokens: int | None
    max_response_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    no_repeat_ngram_size: int
    precision: str | None


@dataclass(frozen=True)
class Protocol:
    """The same, complete."""

    template: str = "auto"
    template_options: Mapping[str, Any] = field(default_factory=dict)
    columns: ColumnsSection = ColumnsSection()
    max_request_tokens: int = 256
    decoding: GenerationSettings = GenerationSettings(256)
    precision: str = "auto"

    @classmethod
    def of(cls, recipe: Recipe | None, asked: Asked) -> "Protocol":
        own = cls()
        if recipe:
            data = recipe.data
            own = cls(
                template=data.template,
                template_options=data.template_options,
                columns=data.columns,
                max_request_tokens=data.max_request_tokens,
                decoding=GenerationSettings.of_recipe(recipe),
                precision=recipe.precision,
            )
        given: dict[str, Any] = {key: v for key, v in asked.items() if v is not None}
        if given.get("template", own.template) != own.template:
            own = replace(own, template_options={})  # they belong to the run's own template
        if "max_response_tokens" in given:
            given["max_new_tokens"] = given.pop("max_response_tokens")
        of_decoding = {
            k: given.pop(k) for k in [*given] if k in GenerationSettings.__dataclass_fields__
        }
        return replace(own, decoding=replace(own.decoding, **of_decoding), **given)

    def encoder(self, tokenizer: Any, date: datetime.date | None) -> Encoder:
        return Encoder(
            tokenizer,
            template=self.template,
            max_request_tokens=self.max_request_tokens,
            max_response_tokens=self.decoding.max_new_tokens,
            template_options=self.template_options,
            date=date,
        )


def evaluate(
    run_or_model: str | Path,
    data: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    *,
    seeds: Sequence[int] = PAPER_SEEDS,
    num_examples: int | None = None,
    teacher: str | None = None,
    output: str | Path | None = None,
    metrics: Sequence[str] = (),
    **asked: Unpack[Asked],
) -> dict[str, Any]:
    """Score a run's student, or any model, on held-out requests, and save scores and predictions.

    Args:
        run_or_model: a run's directory, or a model as ``load_model`` takes it.
        data: path, glob or hub id; several are scored one by one, each under its own name. A
            mapping of names to such is a suite; a list in it makes one data set.
        seeds: decoding seeds; one response per request each.
        num_examples: only the first ones of each data set.
        teacher: also measure KL(student || teacher) on the student's responses, in nats per token;
            a run's own teacher if not given and its tokenizer is the student's, "" for none.
        output: directory; ``RUN/evaluation`` by default, needed for a bare model.
        metrics: computed beside ROUGE-L and exact match: names of ``metrics.METRICS``,
            ``distinct_N``, ``NAME@K`` for pass@k, or ``module:function``.
        asked: template, lengths, sampling and precision: see ``Asked``.

    Returns:
        What ``NAME.json`` holds, NAME being the data's; for several, that of each by name.

    Raises:
        UserError: if the data or model can't be read.
    """
    run, name = Path(run_or_model), str(run_or_model)
    recipe = _recipe_of(run, output)
    protocol = Protocol.of(recipe, asked)
    check_metrics(metrics, len(seeds))
    suite = data if isinstance(data, Mapping) else suite_of_files(listed(data))
    examples = {
        key: read_examples(listed(own), protocol.columns)[:num_examples]
        for key, own in suite.items()
    }
    tokenizer = load_tokenizer(name)
    if teacher is None and recipe and recipe.teacher:
        own = recipe.teacher.model
        teacher = own if same_tokenizer(tokenizer, load_tokenizer(own)) else ""
    encoder = protocol.encoder(tokenizer, date_of_run(run))
    student, teacher_model = load_pair(name, teacher or None, tokenizer, protocol.precision)
    limits = encoder.max_request_tokens, encoder.max_response_tokens
    check_context(student.module.config, *limits, name)
    stop = sorted({*stop_ids(tokenizer, student.module), encoder.eos_token_id})
    engine = TransformersEngine(student, stop)
    results = {}
    for of_suite, rows in examples.items():
        scorer = Scorer(
            data=evaluation_set(rows, encoder),
            tokenizer=tokenizer,
            stop=stop,
            decoding=protocol.decoding,
            metrics=tuple(metrics),
        )
        tqdm.write(f"{of_suite}: {scorer.data.summary()}")
        shown = tqdm(seeds, unit="seed", desc="responses")
        scores, predictions = scorer.score(engine, student, teacher_model, shown)
        evaluation = Evaluation(
            name=of_suite,
            model=name,
            teacher=teacher or None,
            data=tuple(listed(suite[of_suite])),
            num_examples=len(scorer.data),
            num_cut_requests=scorer.data.num_cut_requests,
            template=encoder.template,
            max_request_tokens=encoder.max_request_tokens,
            decoding=protocol.decoding.to_dict(),
            seeds=tuple(seeds),
            dtype=str(student.dtype).removeprefix("torch."),
            scores=scores,
            predictions=tuple(predictions),
        )
        save_evaluation(Path(output) if output is not None else run / "evaluation", evaluation)
        results[of_suite] = evaluation.to_dict()
    return next(iter(results.values())) if isinstance(data, str) else results


def _recipe_of(run: Path, output: str | Path | None) -> Recipe | None:
    """The run's recipe; None for a bare model, which then needs an output."""
    if (run / "recipe.yaml").is_file():
        if not (run / "student").is_dir():
            raise UserError(f"{run} has no student/ yet: let its training finish first.")
        return load_recipe(run / "recipe.yaml")
    if output is None:
        raise UserError(
            f"{run} is not a run: it holds no recipe.yaml. Check its name; or, if it is a model, "
            "say where its scores go: --output DIR."
        )
    return None
