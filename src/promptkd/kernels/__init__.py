"""Faster equivalents of parts of a model on the CPU, and the one call that puts them into it."""

import torch
from torch import nn
from transformers import PreTrainedModel

from promptkd.kernels.attention import attend_grouped
from promptkd.kernels.norms_and_gates import save_only_inputs


def prepare(module: PreTrainedModel, device: torch.device) -> None:
    """Let a loaded model compute with the kernels of ``device``; nothing else changes a model.

    Off the CPU a model stays as it was loaded. On the CPU, attention by torch's kernels becomes
    ``grouped_sdpa``, and norms and gated MLPs save only their inputs for the backward pass; both
    are equal to transformers' up to rounding. What is saved is an ordinary model.
    """
    if device.type == "cpu":
        attend_grouped(module)
        save_only_inputs(module)


def prepare_learner(module: PreTrainedModel, device: torch.device) -> None:
    """Let a model that will be trained add to its gradients in place; a no-op off the CPU.

    The embedding's gradient is the rows of the tokens that were read, added to a gradient that is
    there already (``step.Learner``); otherwise a second matrix of vocabulary x width is made, and
    added whole.
    """
    embeddings = module.get_input_embeddings()
    if device.type == "cpu" and isinstance(embeddings, nn.Embedding):
        embeddings.sparse = True
