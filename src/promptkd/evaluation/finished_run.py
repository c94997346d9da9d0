"""A finished run's models, loaded to be measured, and what they say about given responses."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from promptkd.config import Recipe, load_recipe
from promptkd.data import Encoder
from promptkd.divergences import LogProbs, PerToken
from promptkd.errors import UserError
from promptkd.generation.sampling import Decoding
from promptkd.micro_batches import split_by_length
from promptkd.models.language_model import Head, LanguageModel, select_responses
from promptkd.models.loading import (
    check_context,
    compute_dtype,
    embedding_rows,
    load_model,
    load_tokenizer,
    stop_ids,
)
from promptkd.models.vocabularies import shared_vocabulary
from promptkd.objectives import States, accumulate
from promptkd.rollouts import Rollout
from promptkd.training.checkpoints import writing


@dataclass(frozen=True)
class FinishedRun:
    """A student, its plain teacher, and how the run asked them.

    Attributes:
        encoder: the run's template and limits, with the student's tokenizer.
        stop: every token that ends a response for either model: both are cut alike.
    """

    directory: Path
    recipe: Recipe
    tokenizer: Any
    encoder: Encoder
    student: LanguageModel
    teacher: LanguageModel
    teacher_name: str
    stop: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return str(self.student.dtype).removeprefix("torch.")

    def decoding(self, no_repeat_ngram_size: int = 0) -> Decoding:
        """The run's own: as it sampled in training and validation, where nothing is blocked."""
        return replace(
            Decoding.of_recipe(self.recipe),
            max_new_tokens=self.encoder.max_response_tokens,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )


def load_run(
    run: str | Path, what: str, *, precision: str = "fp32", max_new_tokens: int | None = None
) -> FinishedRun:
    """Load student and teacher of a run over their shared vocabulary.

    Args:
        run: its directory.
        what: what they are needed for, for the error messages.
        precision: auto | bf16 | fp32.
        max_new_tokens: of a response; the run's own if not given.

    Raises:
        UserError: if the run is not finished, has no teacher or two tokenizers, or if requests and
            responses don't fit into a context.
    """
    directory = Path(run)
    if not (directory / "student").is_dir() or not (directory / "recipe.yaml").is_file():
        raise UserError(
            f"{directory} is not a finished run: it has no student/. Name a run directory."
        )
    recipe = load_recipe(directory / "recipe.yaml")
    if recipe.teacher is None:
        raise UserError(
            f"{directory} has no teacher (method '{recipe.method.name}'), and {what} compares the "
            "student with one. Add 'teacher: {model: ...}' to its recipe."
        )
    tokenizer = load_tokenizer(str(directory))
    teacher_tokenizer = load_tokenizer(recipe.teacher.model)
    student = load_for_measuring(str(directory), precision)
    teacher = load_for_measuring(recipe.teacher.model, precision)
    shared = shared_vocabulary(tokenizer, teacher_tokenizer, student.module, teacher.module)
    encoder = Encoder(
        tokenizer,
        recipe.data.template,
        recipe.data.max_request_tokens,
        max_new_tokens or recipe.data.max_response_tokens,
    )
    for model, name in ((student, f"{directory}"), (teacher, recipe.teacher.model)):
        lengths = encoder.max_request_tokens, encoder.max_response_tokens
        check_context(model.module.config, *lengths, name)
    stop = {*stop_ids(tokenizer, student.module), *stop_ids(tokenizer, teacher.module)}
    return FinishedRun(
        directory,
        recipe,
        tokenizer,
        encoder,
        replace(student, vocabulary=shared),
        replace(teacher, vocabulary=shared),
        recipe.teacher.model,
        tuple(sorted(stop)),
    )


def load_for_measuring(name: str, precision: str) -> LanguageModel:
    """A frozen model on the machine's best device, over all of its vocabulary."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(precision, device)
    module: Any = load_model(name, dtype)
    module.to(device).requires_grad_(False)
    return LanguageModel(module, embedding_rows(module), dtype)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is whole or not there.

    Raises:
        UserError: if there is no space; the file that was there before is kept.
    """
    place = path.parent / f".{path.stem}"
    with writing(place, path.name) as temporary:
        (temporary / path.name).write_text(
            json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
        )
    (place / path.name).replace(path)
    place.rmdir()


Voice: TypeAlias = tuple[Callable[[Tensor], Tensor], Head]
"""A model's hidden states as a function of tokens, and the head that reads them."""


@torch.no_grad()
def nats_of_responses(
    rollouts: Sequence[Rollout],
    voices: Mapping[str, Voice],
    losses: Callable[[Mapping[str, LogProbs]], Mapping[str, PerToken]],
    micro_batch_tokens: int,
    device: torch.device,
    select: Callable[[Tensor, Tensor], Tensor] = select_responses,
) -> dict[str, list[PerToken]]:
    """Named losses at every response token: one vector per rollout, in the rollouts' order.

    Args:
        rollouts: any number of them, in any order.
        voices: by name.
        losses: from log-probabilities by voice to nats per token by loss.
        micro_batch_tokens: padded tokens per forward pass.
        device: of the models.
        select: which hidden states are scored.
    """
    placed = [replace(rollout, index=place) for place, rollout in enumerate(rollouts)]
    found: dict[str, dict[int, PerToken]] = {}
    for batch in split_by_length(placed, micro_batch_tokens, device):
        states = {
            name: States(select(speak(batch.tokens), batch.response_mask), head, learns=False)
            for name, (speak, head) in voices.items()
        }
        lengths = [len(rollout.response_ids) for rollout in batch.rollouts]
        nats = accumulate(states, lambda logprobs, _: losses(logprobs), {})
        for name, values in nats.items():
            pieces = values.double().cpu().split(lengths)
            for rollout, piece in zip(batch.rollouts, pieces, strict=True):
                found.setdefault(name, {})[rollout.index] = piece
    return {name: [by_place[i] for i in range(len(placed))] for name, by_place in found.items()}
