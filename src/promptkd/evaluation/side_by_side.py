"""Teacher, adapted teacher and student, side by side on one request."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft

from promptkd.adapters import load_prefix
from promptkd.config import load_recipe
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
    seed: int = 0,
    temperature: float | None = None,
) -> dict[str, str]:
    """What each model of a run responds.

    Args:
        run: a finished run's directory.
        request: the instruction; ``input`` is its optional context.
        temperature: 0 is greedy; the run's own if not given.

    Returns:
        Responses by author: teacher, adapted teacher (if there is one), student.

    Raises:
        UserError: if the directory isn't a finished run.
    """
    run = Path(run)
    if not (run / "student").is_dir() or not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a finished run: it has no student/. Name a run directory.")
    recipe = load_recipe(run / "recipe.yaml")
    device = default_device()
    dtype = compute_dtype(recipe.precision, device)
    decoding = GenerationSettings.of_recipe(recipe)
    if temperature is not None:
        decoding = replace(decoding, temperature=temperature)
    voices: list[tuple[str, str, Path | None]] = []
    if recipe.teacher:
        voices.append(("teacher", recipe.teacher.model, None))
        adapter = run / "teacher_adapter"
        if adapter.is_dir():
            voices.append(("adapted teacher", recipe.teacher.model, adapter))
    voices.append(("student", str(run), None))
    responses = {}
    for author, name, adapter in voices:
        tokenizer = load_tokenizer(name)
        encoder = Encoder.of_recipe(recipe, tokenizer, date=date_of_run(run))
        module: Any = load_model(name, dtype, device)
        kind = adapter_config(adapter).peft_type if adapter else None
        if kind == peft.PeftType.LORA:
            module = peft.PeftModel.from_pretrained(module, str(adapter)).merge_and_unload()
        model = proven(LanguageModel(module, embedding_rows(module), dtype), name)
        front: dict[str, Any] = {}
        if adapter and kind == peft.PeftType.PROMPT_TUNING:
            front["soft_prompt"] = load_soft_prompt(adapter).to(device)
        if adapter and kind == peft.PeftType.PREFIX_TUNING:
            front["prefix"] = load_prefix(model, adapter)
        stop = {*stop_ids(tokenizer, module), encoder.eos_token_id}
        engine = TransformersEngine(model, sorted(stop))
        ids = encoder.request_ids(Example(request, input))
        if len(ids) > encoder.max_request_tokens:
            raise UserError(
                f"The request has {len(ids)} tokens, and this run was made for at most "
                f"{encoder.max_request_tokens} (data.max_request_tokens). Shorten it."
            )
        written = engine.generate([ids], [(seed,)], decoding, **front)[0]
        responses[author] = tokenizer.decode(written.token_ids, skip_special_tokens=True).strip()
    return responses
