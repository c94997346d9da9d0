"""Language models that came as objects: checked, named for the records, and never changed."""

import copy
import os
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from promptkd.errors import UserError
from promptkd.given import GivenModel


def given_model(model: Any, tokenizer: Any, called: str) -> str:
    """A model as whoever loads it takes it: a name as it is, an object with its tokenizer.

    Args:
        model: a name or path, a loaded causal language model, or a ``PeftModel`` (read merged).
        tokenizer: the object's; without it the one is loaded that lies where the model came from.
        called: the argument, for the messages.

    Raises:
        UserError: if it is something else, or only a part of it is in this process.
    """
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if not isinstance(whole, PreTrainedModel) or whole.get_output_embeddings() is None:
        raise UserError(
            f"{called} is a {type(whole).__name__}, not a causal language model. Give a name, or "
            "what transformers' AutoModelForCausalLM.from_pretrained returns."
        )
    _refuse_parts(model, whole, called)
    came_from = whole.name_or_path or ""
    kind = type(whole).__name__
    named = GivenModel(f"{kind} of {came_from}" if came_from else kind, model)
    named.tokenizer = tokenizer or _tokenizer_of(came_from, called)
    return named


def _refuse_parts(model: Any, whole: PreTrainedModel, called: str) -> None:
    """Refuse weights that a copy would miss or couldn't read as plain matrices."""
    places = {parameter.device for parameter in whole.parameters()}
    if len(places) > 1 or torch.device("meta") in places:
        raise UserError(
            f"{called} is spread over {', '.join(sorted(map(str, places)))}. Load it on one "
            "device (without device_map), or give its name."
        )
    if getattr(whole, "is_quantized", False):
        raise UserError(f"{called} is quantised. Load it whole, or give its name.")
    adapted = any(isinstance(part, BaseTunerLayer) for part in whole.modules())
    if adapted and not isinstance(model, peft.PeftModel):
        raise UserError(
            f"{called} has adapters inside. Give the PeftModel around it, or merge them first."
        )


def _tokenizer_of(came_from: str, called: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(came_from)
    except Exception:  # of every kind, as anything may lie there
        raise UserError(
            f"{called} is an object, and there is no tokenizer in {came_from or 'its config'}. "
            "Give it: tokenizer=..."
        ) from None


def copied(given: GivenModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of its own over the object's weights, which are the same tensors where ``dtype`` is.

    Adapters of a ``PeftModel`` are merged. ``own_weights`` makes them the copy's, for training.
    """
    model: Any = given.thing
    if isinstance(model, peft.PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, memo).requires_grad_(True)


@torch.no_grad()
def own_weights(module: PreTrainedModel) -> None:
    """Let a copy's weights be tensors of its own, since training changes them in place."""
    for weight in module.parameters():
        weight.data = weight.data.clone()
