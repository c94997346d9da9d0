"""Teacher, adapted teacher and student, side by side on one request."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft

from promptkd.adapters import load_prefix
from promptkd.config import Recipe, load_recipe
from promptkd.data import Encoder, Example, date_of_run
from promptkd.errors import UserError
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loading import (
    adapter_config,
    compute_dtype,
    default_device,
    embedding_rows,
    load_model,
    load_tokenizer,
    stop_ids,
)
from promptkd.teachers import load_soft_prompt


def generate(
    run: str | Path,
    request: str,
    *,
    input: str = "",
    context: str = "",
    seed: int = 0,
    temperature: float | None = None,
) -> dict[str, str]:
    """What each model of a run responds.

    Args:
        run: a finished run's directory.
        request: the instruction; ``input`` is its optional context.
        context: what only the teacher reads, where the run's teacher does (``teacher.context``).
        temperature: 0 is greedy; the run's own if not given.

    Returns:
        Responses by author: teacher, adapted teacher (if there is one), student.

    Raises:
        UserError: if the directory isn't a finished run.
    """
    run = Path(run)
    _check_finished(run)
    recipe = load_recipe(run / "recipe.yaml")
    decoding = GenerationSettings.of_recipe(recipe)
    if temperature is not None:
        decoding = replace(decoding, temperature=temperature)
    responses = {}
    for author, name, adapter in _voices(run, recipe):
        tokenizer = load_tokenizer(name)
        encoder = Encoder.of_recipe(recipe, tokenizer, date=date_of_run(run))
        model, front = _load_voice(name, adapter, recipe.precision)
        stop = {*stop_ids(tokenizer, model.module), encoder.eos_token_id}
        engine = TransformersEngine(model, sorted(stop))
        if author != "student" and recipe.teacher:
            encoder = encoder.for_teacher(recipe.teacher, tokenizer) or encoder
        ids = encoder.request_ids(Example(request, input, teacher_context=context))
        _check_length(ids, encoder.max_request_tokens)
        written = engine.generate([ids], [(seed,)], decoding, **front)[0]
        responses[author] = tokenizer.decode(written.token_ids, skip_special_tokens=True).strip()
    return responses


def _voices(run: Path, recipe: Recipe) -> Iterator[tuple[str, str, Path | None]]:
    """Who responds: author, model, adapter."""
    if recipe.teacher:
        yield "teacher", recipe.teacher_model(run), None
        adapter = run / "teacher_adapter"
        if adapter.is_dir():
            yield "adapted teacher", recipe.teacher_model(run), adapter
    yield "student", str(run), None


def _check_finished(run: Path) -> None:
    if not (run / "student").is_dir() or not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a finished run: it has no student/. Name a run directory.")


def _load_voice(
    name: str, adapter: Path | None, precision: str
) -> tuple[LanguageModel, dict[str, Any]]:
    """A model with its adapter, and what stands in front of its requests."""
    device = default_device()
    dtype = compute_dtype(precision, device)
    module: Any = load_model(name, dtype, device)
    kind = adapter_config(adapter).peft_type if adapter else None
    if kind == peft.PeftType.LORA:
        module = peft.PeftModel.from_pretrained(module, str(adapter)).merge_and_unload()
    model = proven(LanguageModel(module, embedding_rows(module), dtype), name)
    if adapter and kind == peft.PeftType.PROMPT_TUNING:
        return model, {"soft_prompt": load_soft_prompt(adapter).to(device)}
    if adapter and kind == peft.PeftType.PREFIX_TUNING:
        return model, {"prefix": load_prefix(model, adapter)}
    return model, {}


def _check_length(request_ids: Sequence[int], at_most: int) -> None:
    if len(request_ids) > at_most:
        raise UserError(
            f"The request has {len(request_ids)} tokens, and this run was made for at most "
            f"{at_most} (data.max_request_tokens). Shorten it."
        )
