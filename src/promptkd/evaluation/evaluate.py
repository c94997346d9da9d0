"""Writing responses to held-out requests and scoring them: one protocol, in training and after.

A score always carries its data, decoding settings, seeds, number of examples and interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from promptkd.config import load_recipe
from promptkd.data import Dataset, Encoder, evaluation_set, read_examples
from promptkd.errors import UserError
from promptkd.evaluation.metrics import exact_match, mean_and_deviation, rouge_l
from promptkd.evaluation.predictions import Prediction, save_evaluation, summarise
from promptkd.evaluation.suites import PAPER_SEEDS, listed, name_of
from promptkd.generation.sampling import Decoding
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loading import (
    check_context,
    compute_dtype,
    default_device,
    embedding_rows,
    load_model,
    load_tokenizer,
    stop_ids,
)
from promptkd.models.vocabularies import same_tokenizer, shared_vocabulary
from promptkd.rollouts import Rollout, reference_rollouts
from promptkd.token_losses import loss_sums


def predict(
    engine: Engine, data: Dataset, decoding: Decoding, seed: int, **front: Any
) -> list[Rollout]:
    """One response per request; a function of model, request, decoding and seed alone.

    ``front`` is what ``TransformersEngine.write`` puts before the requests, a soft prompt say.
    """
    responses = engine.write(
        [example.request_ids for example in data.examples],
        [(seed, example.index) for example in data.examples],
        decoding,
        **front,
    )
    return [
        Rollout(example.index, example.request_ids, response.token_ids, "student")
        for example, response in zip(data.examples, responses, strict=True)
    ]


def score(
    rollouts: Sequence[Rollout], data: Dataset, tokenizer: Any, stop: Sequence[int], seed: int
) -> list[Prediction]:
    """Decode responses and compare them with their references."""
    references = {example.index: example.references for example in data.examples}
    predictions = []
    for rollout in rollouts:
        response = tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip()
        known = references[rollout.index]
        predictions.append(
            Prediction(
                rollout.index,
                seed,
                tokenizer.decode(rollout.request_ids, skip_special_tokens=True),
                response,
                known,
                len(rollout.response_ids),
                rollout.response_ids[-1] in stop,
                rouge_l(response, known) if known else None,
                exact_match(response, known) if known else None,
            )
        )
    return predictions


def evaluate(
    run_or_model: str | Path,
    data: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    *,
    seeds: Sequence[int] = PAPER_SEEDS,
    num_examples: int | None = None,
    template: str | None = None,
    max_request_tokens: int | None = None,
    max_response_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    no_repeat_ngram_size: int = 0,
    teacher: str | None = None,
    precision: str | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Score a run's student, or any model, on held-out requests, and save scores and predictions.

    Settings that are not given are the run's own, or the recipe's defaults for a bare model.

    Args:
        run_or_model: a run's directory, or a model as ``load_model`` takes it.
        data: path, glob or hub id, or several that make one data set; a mapping of names to such
            is a suite, whose data sets are scored one by one.
        seeds: decoding seeds; one response per request each.
        num_examples: only the first ones of each data set.
        no_repeat_ngram_size: 6 reproduces the authors' test script, 0 blocks nothing.
        teacher: also measure KL(student || teacher) on the student's responses, in nats per token;
            a run's own teacher if not given and its tokenizer is the student's, "" for none.
        output: directory; ``RUN/evaluation`` by default, needed for a bare model.

    Returns:
        What ``NAME.json`` holds, NAME being the data's; for a suite, that of each by name.

    Raises:
        UserError: if the data or model can't be read.
    """
    run = Path(run_or_model)
    is_run = (run / "recipe.yaml").is_file()
    defaults = load_recipe(run / "recipe.yaml") if is_run else None
    if is_run and not (run / "student").is_dir():
        raise UserError(f"{run} has no student/ yet: let its training finish first.")
    if output is None and not is_run:
        raise UserError(f"{run} is not a run, so scores need a place: give --output DIR.")
    suite = data if isinstance(data, Mapping) else {name_of(data): data}
    examples = {name: read_examples(listed(own))[:num_examples] for name, own in suite.items()}
    device = default_device()
    dtype = compute_dtype(precision or (defaults.precision if defaults else "auto"), device)
    name = str(run_or_model)
    tokenizer = load_tokenizer(name)
    if teacher is None and defaults and defaults.teacher:
        own = defaults.teacher.model
        teacher = own if same_tokenizer(tokenizer, load_tokenizer(own)) else ""
    module = load_model(name, dtype, device)

    def setting(given: Any, of_run: Any, otherwise: Any) -> Any:
        return given if given is not None else of_run if defaults else otherwise

    encoder = Encoder(
        tokenizer,
        setting(template, defaults and defaults.data.template, "alpaca"),
        setting(max_request_tokens, defaults and defaults.data.max_request_tokens, 256),
        setting(max_response_tokens, defaults and defaults.data.max_response_tokens, 256),
    )
    check_context(module.config, encoder.max_request_tokens, encoder.max_response_tokens, name)
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    decoding = replace(
        Decoding.of_recipe(defaults) if defaults else Decoding(encoder.max_response_tokens),
        max_new_tokens=encoder.max_response_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
        **{name: value for name, value in asked.items() if value is not None},
    )
    vocabulary, teacher_model = embedding_rows(module), None
    if teacher:
        teacher_module = load_model(teacher, dtype, device)
        shared = shared_vocabulary(tokenizer, load_tokenizer(teacher), module, teacher_module)
        vocabulary = shared
        teacher_model = proven(LanguageModel(teacher_module, shared, dtype), teacher)
    student = proven(LanguageModel(module, vocabulary, dtype), name)
    results = {}
    for of_suite, rows in examples.items():
        dataset = evaluation_set(rows, encoder)
        scores, predictions = _score_model(
            student, teacher_model, dataset, tokenizer, decoding, seeds
        )
        results[of_suite] = {
            "model": name,
            "teacher": teacher or None,
            "data": listed(suite[of_suite]),
            "num_examples": len(dataset),
            "num_cut_requests": dataset.num_cut_requests,
            "template": encoder.template,
            "max_request_tokens": encoder.max_request_tokens,
            "decoding": decoding.to_dict(),
            "seeds": list(seeds),
            "dtype": str(dtype).removeprefix("torch."),
            "scores": scores,
        }
        directory = Path(output) if output is not None else run / "evaluation"
        save_evaluation(directory, of_suite, results[of_suite], predictions)
    return results if isinstance(data, Mapping) else next(iter(results.values()))


def _score_model(
    student: LanguageModel,
    teacher: LanguageModel | None,
    dataset: Dataset,
    tokenizer: Any,
    decoding: Decoding,
    seeds: Sequence[int],
) -> tuple[dict[str, Any], list[Prediction]]:
    stop = stop_ids(tokenizer, student.module)
    engine = TransformersEngine(student, stop)
    predictions, sums = [], []
    for seed in tqdm(seeds, unit="seed", desc="responses"):
        rollouts = predict(engine, dataset, decoding, seed)
        predictions += score(rollouts, dataset, tokenizer, stop, seed)
        if teacher:
            sums.append(loss_sums(rollouts, student, teacher, 4096))
    scores = summarise(predictions)
    if sums:
        by_seed = [s.mean_reverse_kl for s in sums]
        mean, deviation = mean_and_deviation(by_seed)
        scores["reverse_kl_to_teacher"] = {
            "mean": mean,
            "deviation_over_seeds": deviation,
            "by_seed": by_seed,
        }
    if all(example.response_ids for example in dataset.examples):
        own = loss_sums(reference_rollouts(dataset.examples), student, None, 4096)
        scores["cross_entropy"] = {"mean": own.mean_cross_entropy}
    return scores, predictions
