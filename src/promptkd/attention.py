"""Attention by fewer and larger products: sooner than torch's kernels, equal up to rounding.

Heads of queries that share a head of keys (grouped-query attention, arXiv:2305.13245) are the rows
of one product, with nothing copied. Two cases gain by it: one new token per row while text is
written, and whole sequences in bf16 on a processor, where torch's fused kernel takes 1.5 to 4
times as long (benchmarks/attention.py). There scores are rounded to bf16, as in transformers' eager
attention. Everything else is torch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.amp.autocast_mode import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

softmax_backward = torch.ops.aten._softmax_backward_data
NAME = "promptkd_sdpa"
BLOCK = 64
"""Queries of each head at a time: their scores fit a cache, and later keys are left out."""


def attend_grouped(module: PreTrainedModel) -> None:
    """Let a model that attends by torch's kernels attend by ``grouped_sdpa`` from now on."""
    if module.config._attn_implementation == "sdpa":
        module.set_attn_implementation(NAME)


def grouped_sdpa(
    module: nn.Module,
    query: Float[Tensor, "batch heads time width"],
    key: Float[Tensor, "batch shared positions width"],
    value: Float[Tensor, "batch shared positions width"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``sdpa_attention_forward`` of transformers does, and with its arguments.

    Args:
        attention_mask: (batch, 1, time, positions); None is causal.

    Returns:
        (batch, time, heads, width).
    """
    batch, heads, time, width = query.shape
    shared, scale = key.shape[1], kwargs.get("scaling") or width**-0.5
    if kwargs.get("position_bias") is not None or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if time == 1 and shared < heads:
        rows = query.reshape(batch, shared, heads // shared, width)
        mixed = scaled_dot_product_attention(
            rows, key, value, attn_mask=attention_mask, scale=scale
        )
        return mixed.reshape(batch, 1, heads, width), None
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    whole = is_causal and attention_mask is None and key.shape[2] == time
    # Queries and keys may be fp32 here, rotated under autocast; torch would cast them as well.
    if whole and value.dtype == torch.bfloat16 and value.device.type == "cpu":
        mixed: Any = CausalAttention.apply(query, key, value, scale)
        return mixed.transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)


class CausalAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V over the positions up to each query's own.

    With P the softmax and O = P V, the gradients are

        dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))
        dQ = scale dS K    dK = scale dS^T Q

    P is made again in the backward pass, so memory grows with the length, not with its square. The
    scores are rounded to the precision of the products; dK and dV are summed in fp32.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, time, width = query.shape
        shared = key.shape[1]
        together = heads // shared
        # Heads that share keys lie side by side, so that a block of queries is a slice of rows.
        queries = query.unflatten(1, (shared, together)).transpose(2, 3)
        queries = queries.reshape(batch * shared, time * together, width)
        keys, values = (_whole_blocks(given) for given in (key, value))
        mixed = query.new_empty(batch, time, shared, together, width).transpose(1, 2)
        for block in _blocks(time):
            weights = _weights(queries, keys, block, together, scale)
            rows = weights @ values[:, : weights.shape[-1]]
            mixed[:, :, block] = rows.view(batch, shared, -1, together, width)
        ctx.save_for_backward(queries, keys, values)
        ctx.scale, ctx.shape = scale, mixed.shape
        return mixed.transpose(2, 3).flatten(1, 2)

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        queries, keys, values = ctx.saved_tensors
        batch, shared, time, together, width = ctx.shape
        gradient = gradient.unflatten(1, (shared, together)).transpose(2, 3)
        to_queries = queries.new_empty(batch, time, shared, together, width).transpose(1, 2)
        to_keys, to_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for block in _blocks(time):
            weights = _weights(queries, keys, block, together, ctx.scale)
            seen = slice(0, weights.shape[-1])
            rows = queries[:, together * block.start : together * block.stop]
            outer = gradient[:, :, block].reshape(rows.shape)
            to_values[:, seen] += weights.mT @ outer
            to_weights = outer @ values[:, seen].mT
            to_scores = softmax_backward(to_weights, weights, -1, weights.dtype)
            to_keys[:, seen] += to_scores.mT @ rows
            to_rows = _product(to_scores, keys[:, seen], ctx.scale)
            to_queries[:, :, block] = to_rows.view(batch, shared, -1, together, width)
        to_keys *= ctx.scale
        key_shape = batch, shared, time, width
        return (
            to_queries.transpose(2, 3).flatten(1, 2),
            to_keys[:, :time].to(queries.dtype).view(key_shape),
            to_values[:, :time].to(queries.dtype).view(key_shape),
            None,
        )


def _blocks(time: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, time)) for start in range(0, time, BLOCK)]


def _whole_blocks(
    given: Float[Tensor, "batch shared time width"],
) -> Float[Tensor, "groups padded width"]:
    """Zeros up to a multiple of ``BLOCK``: later than every query, and a softmax likes it."""
    return F.pad(given, (0, 0, 0, -given.shape[2] % BLOCK)).flatten(0, 1)


def _product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """``scale * one @ other``, rounded once."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale)


def _weights(
    queries: Float[Tensor, "groups queries width"],
    keys: Float[Tensor, "groups padded width"],
    block: slice,
    together: int,
    scale: float,
) -> Float[Tensor, "groups rows seen"]:
    """P of a block: what its queries make of the keys up to the block's end.

    Args:
        together: rows of ``queries`` per position, the heads that share keys.
    """
    rows = queries[:, together * block.start : together * block.stop]
    scores = _product(rows, keys[:, : block.start + BLOCK].mT, scale)
    later = scores.new_full((block.stop - block.start, BLOCK), -torch.inf).triu_(1)
    scores.unflatten(1, (-1, together))[..., block.start :] += later.unsqueeze(1)
    return scores.softmax(-1)
