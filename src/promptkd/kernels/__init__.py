"""Faster equivalents of parts of a model, and the one call that puts them into it."""

import torch
from torch import nn
from transformers import PreTrainedModel

from promptkd.errors import UserError
from promptkd.kernels.attention import attend_grouped
from promptkd.kernels.compiled import compile_layers
from promptkd.kernels.norms_and_gates import save_only_inputs

IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
"""The recipe's names of attention, and transformers'."""


def prepare(
    module: PreTrainedModel,
    device: torch.device,
    attention: str = "auto",
    compiled: bool = False,
) -> None:
    """Let a loaded model compute with the kernels of ``device``; nothing else changes a model.

    Attention by torch's kernels becomes ``grouped_sdpa``, unless another is asked for. On the CPU
    norms and gated MLPs save only their inputs for the backward pass, unless layers are compiled
    whole. All are equal to transformers' up to rounding. What is saved is an ordinary model.

    Raises:
        UserError: if the model or this machine doesn't have that attention, or can't compile.
    """
    if attention != "auto":
        _attend_by(module, device, attention)
    else:
        attend_grouped(module)
    if compiled:
        compile_layers(module, device)
    elif device.type == "cpu":
        save_only_inputs(module)


def _attend_by(module: PreTrainedModel, device: torch.device, attention: str) -> None:
    name = type(module).__name__
    if attention == "flash" and device.type != "cuda":
        raise UserError(
            f"attention is flash, which needs a GPU; this machine has the device {device}. Set "
            "attention: auto."
        )
    try:
        module.set_attn_implementation(IMPLEMENTATIONS[attention])
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"attention is {attention}, which {name} can't use here: {reason:.200} Set attention: "
            "auto."
        ) from None
    if module.config._attn_implementation != IMPLEMENTATIONS[attention]:
        raise UserError(f"attention is {attention}, which {name} doesn't have. Set it to auto.")


def prepare_learner(module: PreTrainedModel, device: torch.device) -> None:
    """Let a model that will be trained add to its gradients in place; a no-op off the CPU.

    The embedding's gradient is the rows of the tokens that were read, added to a gradient that is
    there already (``Learner``); otherwise a second matrix of vocabulary x width is made, and added
    whole.
    """
    embeddings = module.get_input_embeddings()
    if device.type == "cpu" and isinstance(embeddings, nn.Embedding):
        embeddings.sparse = True
