"""Faster equivalents of parts of a model on the CPU, and the one call that puts them into it."""

import torch
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
