"""Teacher, adapted teacher and student, side by side on one request."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from tqdm.auto import tqdm

from promptkd.adapters import load_prefix
from promptkd.bars import progress_bar
from promptkd.config import Recipe
from promptkd.data import (
    Encoder,
    Example,
    adopt_chat_template,
    date_of_run,
    template_of_run,
)
from promptkd.errors import UserError
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.given import is_lost
from promptkd.models.damage import reason_of
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
from promptkd.records import Record
from promptkd.run import Place, TrainedRun
from promptkd.teachers import load_soft_prompt


class Responses(Record):
    """What each author responds, by author."""

    def lines(self) -> Iterator[str]:
        """Every response under its author."""
        for author, response in self.items():
            yield f"--- {author}\n{response}\n"


def generate(
    run: Place,
    request: str,
    *,
    input: str = "",
    context: str = "",
    seed: int = 0,
    temperature: float | None = None,
) -> Responses:
    """What each model of a run responds.

    Args:
        run: a finished run or its directory.
        request: the instruction; ``input`` is its optional context.
        context: what only the teacher reads, where the run's teacher does (``teacher.context``).
        temperature: 0 is greedy; the run's own if not given.

    Returns:
        Responses by author: teacher, adapted teacher (if there is one), student. A teacher that
        came as an object is left out where it isn't given again.

    Raises:
        UserError: if the directory isn't a finished run.
    """
    place, recipe = Path(run), TrainedRun.finished(run).recipe
    _check(request, context, recipe)
    otherwise = {} if temperature is None else {"temperature": temperature}
    decoding = replace(GenerationSettings.of_recipe(recipe), **otherwise)
    template, date = template_of_run(place, recipe.data.template), date_of_run(place)
    students = load_tokenizer(str(place))
    responders, responses = [*_responders(place, recipe)], Responses()
    with progress_bar(total=len(responders), unit="model") as bar:
        for author, name, adapter in responders:
            bar.set_description(f"the {author} responds")
            tokenizer = load_tokenizer(name)
            adopt_chat_template(tokenizer, students)  # a teacher without one was asked by it
            encoder = Encoder.of_recipe(recipe, tokenizer, date=date, template=template)
            model, front = _load_responder(name, adapter, recipe.precision)
            stop = {*stop_ids(tokenizer, model.module), encoder.eos_token_id}
            engine = TransformersEngine(model, sorted(stop))
            if author != "student" and recipe.teacher:
                encoder = encoder.for_teacher(recipe.teacher, tokenizer) or encoder
            ids = encoder.request_ids(Example(request, input, teacher_context=context))
            _check_length(ids, encoder.max_request_tokens)
            token_ids = engine.generate([ids], [(seed,)], decoding, **front)[0].token_ids
            responses[author] = tokenizer.decode(token_ids, skip_special_tokens=True).strip()
            bar.update()
    return responses


def _responders(run: Path, recipe: Recipe) -> Iterator[tuple[str, str, Path | None]]:
    """Who responds: author, model, adapter."""
    name = recipe.teacher_model(run) if recipe.teacher else None
    if name and is_lost(name):
        tqdm.write(f"the teacher, {name}, isn't here: the run that pk.train returns has it")
    elif name:
        yield "teacher", name, None
        adapter = run / "teacher_adapter"
        if adapter.is_dir():
            yield "adapted teacher", name, adapter
    yield "student", str(run), None


def _check(request: str, context: str, recipe: Recipe) -> None:
    if not request.strip():
        raise UserError("The request is empty. Say what the models are asked.")
    if context and not (recipe.teacher and recipe.teacher.context):
        raise UserError(
            "A context is given, but the run's teacher reads none (teacher.context), so it would "
            "be lost. Write it into the input, which all models read."
        )


def _load_responder(
    name: str, adapter: Path | None, precision: str
) -> tuple[LanguageModel, dict[str, Any]]:
    """A model with its adapter, and what stands in front of its requests."""
    device = default_device()
    dtype = compute_dtype(precision, device)
    module: Any = load_model(name, dtype, device)
    kind = adapter_config(adapter).peft_type if adapter else None
    if kind == peft.PeftType.LORA:
        module = _with_lora(module, str(adapter))
    model = proven(LanguageModel(module, embedding_rows(module), dtype), name)
    if adapter and kind == peft.PeftType.PROMPT_TUNING:
        return model, {"soft_prompt": load_soft_prompt(adapter).to(device)}
    if adapter and kind == peft.PeftType.PREFIX_TUNING:
        return model, {"prefix": load_prefix(model, adapter)}
    return model, {}


def _with_lora(module: Any, adapter: str) -> Any:
    try:
        return peft.PeftModel.from_pretrained(module, adapter).merge_and_unload()
    except Exception as error:  # of every kind, as the file may be damaged in any way
        reason = reason_of(error)
        raise UserError(f"{adapter} is damaged ({reason}). Train the run again.") from None


def _check_length(request_ids: Sequence[int], at_most: int) -> None:
    if len(request_ids) > at_most:
        raise UserError(
            f"The request has {len(request_ids)} tokens, and this run was made for at most "
            f"{at_most} (data.max_request_tokens). Shorten it."
        )
