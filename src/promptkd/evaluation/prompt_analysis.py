"""What adaptation did: where the soft prompt went, and what the teacher says differently for it.

    vectors   the tokens nearest to each vector, and how far it moved from where it started
    table 4   KL between the teacher, without and with its prompt, and the first and final student
    drift     KL(p_P || p): how far the prompted teacher is from the plain one
    text      ROUGE-L, lengths and some responses of both teachers, beside the final student's

KLs are teacher-forced, in nats per response token, on the final student's own responses and, where
the data has them, on the references. The paper states neither the responses nor the direction of
its Table 4; both directions are given here.

Source: PromptKD, arXiv:2402.12842, Tables 2 and 4.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from promptkd.bars import progress_bar
from promptkd.composition import Method
from promptkd.data import Dataset, training_set
from promptkd.divergences import LogProbs, PerToken, kl
from promptkd.errors import UserError
from promptkd.evaluation.finished_run import FinishedRun, load_run
from promptkd.evaluation.results import Prediction, summarise, totals
from promptkd.evaluation.scorer import predict, score
from promptkd.evaluation.statistics import bootstrap_interval, paired_difference
from promptkd.files import write_json
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.methods import build_method
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import check_context, load_language_model, load_tokenizer
from promptkd.records import Record
from promptkd.rollouts import Rollout, reference_rollouts
from promptkd.run import Place
from promptkd.teachers import load_soft_prompt, prompt_vectors
from promptkd.token_losses import Reader, token_losses

MICRO_BATCH_TOKENS = 4096
"""Tokens per forward pass, padding included."""
TOKENS_AT_ONCE = 16384
"""Embeddings compared in one piece; bounds the memory, not the result."""
WORK_PER_SET = 4
"""What the progress bar counts: three models respond, then their KLs are taken."""

DEFINITION = {
    "kl_teacher_first_student": "KL(teacher || student before training), nats per response token",
    "kl_teacher_final_student": "KL(teacher || student after training), nats per response token",
    "kl_first_student_teacher": "KL(student before training || teacher), nats per response token",
    "kl_final_student_teacher": "KL(student after training || teacher), nats per response token",
    "kl_prompted_plain": "KL(teacher with prompt || teacher without), nats per response token",
    "responses": "'student': written by the final student; 'reference': the data's own",
    "rouge_l": "of the responses the teacher writes, against the references, percent",
    "response_length": "of the responses the teacher writes, mean",
    "ended": "share of the teacher's responses that end within the limit, percent",
    "differences": "with prompt - without; intervals: bootstrap over requests",
    "moved": "Euclidean distance from the initial vector; moved_share: over the initial norm",
}
TABLE_4_KLS = {
    "kl_teacher_first_student": ("{teacher}", "first"),
    "kl_teacher_final_student": ("{teacher}", "final"),
    "kl_first_student_teacher": ("first", "{teacher}"),
    "kl_final_student_teacher": ("final", "{teacher}"),
}


PARTS = ("table_4", "differences", "drift", "responses")


@dataclass(frozen=True)
class Cast:
    """Everybody who is compared: the run's models, its first student, and the soft prompt."""

    run: FinishedRun
    first_student: LanguageModel
    soft_prompt: Float[Tensor, "length width"]

    def nats(self, rollouts: Sequence[Rollout]) -> dict[str, list[Tensor]]:
        """Every KL of the analysis at every response token, rollout by rollout.

        The key of KL(a || b) is ``a|b``, with a and b out of first, final, plain and prompted.
        """
        plain, final, first = self.run.teacher, self.run.student, self.first_student

        def losses(logprobs: Mapping[str, LogProbs], tokens: Tensor) -> Mapping[str, PerToken]:
            pairs = [
                pair
                for student in ("first", "final")
                for teacher in ("plain", "prompted")
                for pair in ((teacher, student), (student, teacher))
            ]
            pairs.append(("prompted", "plain"))
            return {f"{a}|{b}": kl(logprobs[a], logprobs[b]) for a, b in pairs}

        return token_losses(
            rollouts,
            {
                "first": Reader(first),
                "final": Reader(final),
                "plain": Reader(plain, is_teacher=True),
                "prompted": Reader(plain, self.soft_prompt, is_teacher=True),
            },
            losses,
            MICRO_BATCH_TOKENS,
        )


class PromptAnalysis(Record):
    """What ``prompt_analysis.json`` holds."""

    def lines(self) -> Iterator[str]:
        """Where each vector went, and the paper's Table 4."""
        for row in self.vectors:
            nearest = row["nearest_by_cosine"][0]
            yield (
                f"vector {row['position']}: from {row['initial_token']['token']!r}, moved "
                f"{row['moved']:.3f}; nearest by cosine {nearest['token']!r} "
                f"({nearest['cosine']:.3f})"
            )
        for row in self.table_4:
            yield (
                f"{row['data']}, {row['responses']}, {'with' if row['prompt'] else 'without'} "
                f"prompt: KL(teacher || student) {row['kl_teacher_first_student']:.4f} before "
                f"training, {row['kl_teacher_final_student']:.4f} after, nats per token"
            )


def prompt_analysis(
    run: Place,
    data: Any = None,
    *,
    method: Method | None = None,
    num_examples: int = 100,
    num_neighbours: int = 5,
    num_shown: int = 4,
    seed: int = 10,
    precision: str = "fp32",
) -> PromptAnalysis:
    """Analyse the soft prompt of a finished run and save ``RUN/prompt_analysis.json``.

    Args:
        run: itself or its directory.
        data: held-out requests, as a recipe's data or rows; else the run's validation data.
        method: what the run was made with, if it was composed in Python.
        num_examples: the first ones of either set; the paper takes 1,000.
        num_neighbours: tokens named for each vector.
        num_shown: requests of either set whose responses, drawn with ``seed``, are kept.
        precision: auto | bf16 | fp32, of the models' matrices; KLs are computed in fp32.

    Returns:
        What the file holds; its ``definition`` says what each number is.

    Raises:
        UserError: if the run has no soft prompt, or was made with another method than given.
    """
    finished = load_run(run, "an analysis of the prompt", precision=precision)
    method = _method_of(finished, method)
    initial, final = _soft_prompts(finished, method)
    speaker = finished.teacher, finished.tokenizer
    first = load_language_model(finished.recipe.student.model, precision)
    cast = Cast(finished, replace(first, vocabulary=finished.student.vocabulary), final)
    sources = finished.held_out(data)
    sets = _requests(finished, sources, num_examples)
    analysed = _analyse(cast, sets, seed, num_shown)
    result = finished.protocol(finished.decoding()) | {
        "first_student": finished.recipe.student.model,
        "method": repr(method),
        "data": {"train": list(finished.recipe.data.train), "validation": sources},
        "num_examples": {name: len(dataset) for name, dataset in sets.items()},
        "seed": seed,
        "definition": DEFINITION,
        "vectors": describe_vectors(initial, final, *speaker, num_neighbours),
        **{part: [row for own in analysed for row in own[part]] for part in PARTS},
    }
    write_json(Path(run) / "prompt_analysis.json", result)
    return PromptAnalysis(result)


def _analyse(
    cast: Cast, sets: Mapping[str, Dataset], seed: int, num_shown: int
) -> list[dict[str, list[dict[str, Any]]]]:
    with progress_bar(total=WORK_PER_SET * len(sets), unit="pass") as bar:
        return [_analyse_set(cast, *own, seed, num_shown, bar) for own in sets.items()]


def _requests(run: FinishedRun, sources: list[str], num_examples: int) -> dict[str, Dataset]:
    """The first training requests, and held-out ones where there are any."""
    rows = run.read(run.recipe.data.train)
    trained = training_set(rows, run.encoder, run.teacher_encoder)
    sets = {"train": Dataset(trained.examples[:num_examples])}
    if sources:
        sets["validation"] = run.evaluation_set(sources, num_examples)
    return sets


def describe_vectors(
    initial: Float[Tensor, "length width"],
    final: Float[Tensor, "length width"],
    model: LanguageModel,
    tokenizer: Any,
    num_neighbours: int,
) -> list[dict[str, Any]]:
    """One row per vector of the prompt: its nearest tokens, and how far it is from its start."""
    cosines, distances = compare_with_tokens(final, model)
    _, from_start = compare_with_tokens(initial, model)

    def token(i: int) -> dict[str, Any]:
        return {"id": i, "token": tokenizer.convert_ids_to_tokens(i)}

    def nearest(values: Tensor, name: str, largest: bool) -> list[dict[str, Any]]:
        found = values.topk(min(num_neighbours, len(values)), largest=largest)
        return [
            {**token(i), name: value}
            for value, i in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]

    rows = []
    for position in range(len(final)):
        start, end = initial[position], final[position]
        moved = (end - start).norm().item()
        rows.append(
            {
                "position": position,
                "initial_token": token(int(from_start[position].argmin())),
                "initial_norm": start.norm().item(),
                "norm": end.norm().item(),
                "moved": moved,
                "moved_share": moved / start.norm().item() if start.any() else None,
                "cosine_to_initial": F.cosine_similarity(start, end, dim=0).item(),
                "nearest_by_cosine": nearest(cosines[position], "cosine", largest=True),
                "nearest_by_distance": nearest(distances[position], "distance", largest=False),
            }
        )
    return rows


def compare_with_tokens(
    vectors: Float[Tensor, "length width"], model: LanguageModel
) -> tuple[Float[Tensor, "length vocab"], Float[Tensor, "length vocab"]]:
    """Cosine and Euclidean distance to every token's embedding, as the trunk receives it."""
    cosines, distances = [], []
    for start in range(0, model.vocabulary, TOKENS_AT_ONCE):
        ids = range(start, min(start + TOKENS_AT_ONCE, model.vocabulary))
        table = prompt_vectors(model, ids)
        cosines.append(F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T)
        # The faster way by inner products is off by 1e-3 where a vector sits on its token.
        distances.append(torch.cdist(vectors, table, compute_mode="donot_use_mm_for_euclid_dist"))
    return torch.cat(cosines, dim=1), torch.cat(distances, dim=1)


def _analyse_set(
    cast: Cast, name: str, data: Dataset, seed: int, num_shown: int, bar: Any
) -> dict[str, list[dict[str, Any]]]:
    """The rows of one set of requests, by part of the result."""
    run, decoding = cast.run, cast.run.decoding()
    by_teacher = TransformersEngine(run.teacher, run.stop)
    by_student = TransformersEngine(run.student, run.stop)
    written = {}
    for author, engine, front in (
        ("student", by_student, {}),
        ("plain", by_teacher, {"by_teacher": True}),
        ("prompted", by_teacher, {"by_teacher": True, "soft_prompt": cast.soft_prompt}),
    ):
        bar.set_description(f"{name}: responses, {author}")
        written[author] = predict(engine, data, decoding, seed, **front)
        bar.update()
    predictions = {
        author: score(rollouts, data, run.tokenizer, run.stop, seed)
        for author, rollouts in written.items()
    }
    forced = {"student": written["student"]}
    if data.has_references:
        forced["reference"] = reference_rollouts(data.examples)
    table, differences, drift = [], [], []
    bar.set_description(f"{name}: KLs")
    for whose, rollouts in forced.items():
        nats = cast.nats(rollouts)
        sums = {key: [values.sum().item() for values in rows] for key, rows in nats.items()}
        counts = [len(rollout.response_ids) for rollout in rollouts]
        where = {"data": name, "responses": whose}
        for prompted in (False, True):
            teacher = "prompted" if prompted else "plain"
            means = {key: sum(sums[_key(key, teacher)]) / sum(counts) for key in TABLE_4_KLS}
            scores = summarise(predictions[teacher])
            row = {key: value.mean for key, value in scores.items() if key != "exact_match"}
            table.append({**where, "prompt": prompted, **means, **row})
        differences.append({**where, **_kl_differences(sums, counts)})
        drift.append(
            {**where, **_with_interval("kl_prompted_plain", sums["prompted|plain"], counts)}
        )
    bar.update()
    for row in differences:
        row |= _text_differences(predictions["plain"], predictions["prompted"])
    shown = _shown(name, predictions, num_shown)
    return {"table_4": table, "differences": differences, "drift": drift, "responses": shown}


def _shown(
    name: str, predictions: Mapping[str, Sequence[Prediction]], num_shown: int
) -> list[dict[str, Any]]:
    """The first requests with what everybody responds."""
    shown = (predictions[who][:num_shown] for who in ("plain", "prompted", "student"))
    return [
        {
            "data": name,
            "index": plain.index,
            "request": plain.request,
            "references": list(plain.references),
            "teacher": plain.response,
            "prompted_teacher": prompted.response,
            "student": student.response,
        }
        for plain, prompted, student in zip(*shown, strict=True)
    ]


def _key(name: str, teacher: str) -> str:
    return "|".join(TABLE_4_KLS[name]).format(teacher=teacher)


def _kl_differences(
    sums: Mapping[str, list[float]], counts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name in TABLE_4_KLS:
        pairs = zip(sums[_key(name, "prompted")], sums[_key(name, "plain")], strict=True)
        rows |= _with_interval(name, [prompted - plain for prompted, plain in pairs], counts)
    return rows


def _text_differences(
    plain: Sequence[Prediction], prompted: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    rows = {}
    for name in ("rouge_l", "response_length"):
        own, other = totals(prompted, name), totals(plain, name)
        if own:
            mean, low, high = paired_difference([*own.values()], [*other.values()])
            rows[name] = {"mean": mean, "interval_95": [low, high]}
    return rows


def _with_interval(
    name: str, sums: Sequence[float], counts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    mean = sum(sums) / sum(counts)
    return {name: {"mean": mean, "interval_95": list(bootstrap_interval(sums, counts))}}


def _method_of(run: FinishedRun, given: Method | None) -> Method:
    """The method that made the run, proven by its record."""
    section = run.recipe.method
    method = given or build_method(section.name, **section.options)
    record = json.loads((run.directory / "environment.json").read_text())
    if not method.is_recorded(record["identity"]["method"]):
        raise UserError(
            f"{run.directory} was made with {record['identity']['method']}, not with "
            f"{method!r}. A method composed in Python is not in the recipe: pass it as method=."
        )
    return method


def _soft_prompts(
    run: FinishedRun, method: Method
) -> tuple[Float[Tensor, "length width"], Float[Tensor, "length width"]]:
    """Where the prompt started and where it ended."""
    tokenizer = load_tokenizer(run.teacher_name)
    built = method.teacher.build(run.teacher, tokenizer) if method.teacher else None
    if built is None or built.soft_prompt is None:
        raise UserError(
            f"{run.directory} has no soft prompt to analyse: its method is '{method.name}' with "
            f"the teacher {method.teacher!r}. Name a run of promptkd with teacher=soft_prompt."
        )
    initial = built.soft_prompt.detach()
    final = load_soft_prompt(run.directory / "teacher_adapter").to(run.teacher.device)
    limits = run.encoder.max_request_tokens, run.encoder.max_response_tokens
    check_context(run.teacher.module.config, *limits, run.teacher_name, front=len(final))
    return initial, final
