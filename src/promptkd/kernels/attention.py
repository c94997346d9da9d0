"""Grouped-query attention on the CPU as a few large matmuls: whole bf16 steps 1.7 times as fast.

Query heads that share a key head (arXiv:2305.13245) are the rows of one matmul, with nothing
copied (benchmarks/kernel_gains.py). Two cases gain by it: one new token per row during generation,
and whole sequences in bf16, where torch's fused kernel is slow on CPUs (benchmarks/attention.py).
Scores are rounded to bf16 there, as in transformers' eager attention. Everything else is torch's.

Attention is also where packed sequences are kept apart: their lengths come in place of a mask. On
a GPU torch's ``varlen_attn`` takes them as they lie, where it can, else they are laid side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.amp.autocast_mode import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
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


def can_pack(module: PreTrainedModel, longest: int) -> bool:
    """Whether sequences of at most ``longest`` tokens may lie end to end in one row.

    They may if attention is all by which positions see each other (no recurrence, no convolution)
    and no layer's window is shorter than ``longest``. ``language_model.proven`` tries it out.
    """
    config: Any = module.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        not module._is_stateful
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and all(window is None or longest <= window for window in windows)
    )


def packed_arguments(module: PreTrainedModel, lengths: list[int]) -> dict[str, Any]:
    """A trunk's arguments for one row in which sequences of ``lengths`` follow each other.

    Positions start anew in each sequence: transformers' own attentions tell them apart by that.
    ``grouped_sdpa`` is given their lengths instead: transformers hands a mask of four axes on as it
    is to every layer.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    arguments: dict[str, Any] = {"position_ids": positions.to(module.device)}
    if module.config._attn_implementation == NAME:
        arguments["attention_mask"] = torch.tensor(lengths).view(1, 1, 1, -1)
    return arguments


def grouped_sdpa(
    module: nn.Module,
    query: Float[Tensor, "batch heads time width"],
    key: Float[Tensor, "batch shared positions width"],
    value: Float[Tensor, "batch shared positions value_width"],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``sdpa_attention_forward`` of transformers does, and with its arguments.

    Args:
        attention_mask: (batch, 1, time, positions); None is causal; integers are the lengths of
            causal sequences that lie end to end in a batch of one, see ``packed_arguments``.

    Returns:
        (batch, time, heads, value_width).
    """
    batch, heads, time, width = query.shape
    shared, scale = key.shape[1], kwargs.get("scaling") or width**-0.5
    packed = attention_mask is not None and attention_mask.dtype == torch.int64
    lengths = attention_mask.flatten().tolist() if packed else batch * [time]  # pyright: ignore
    if kwargs.get("position_bias") is not None or kwargs.get("dropout"):
        assert not packed, "no model that can be packed has them in evaluation mode"
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if time == 1 and shared < heads and not packed:
        rows = query.reshape(batch, shared, heads // shared, width)
        mixed = scaled_dot_product_attention(
            rows, key, value, attn_mask=attention_mask, scale=scale
        )
        return mixed.reshape(batch, 1, heads, -1), None
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    whole = is_causal and attention_mask is None and key.shape[2] == time
    # Queries and keys may be fp32 here, rotated under autocast; torch would cast them as well.
    in_bf16 = value.dtype == torch.bfloat16 and value.device.type == "cpu"
    if in_bf16 and value.shape == key.shape and (whole or packed):
        flat = [given.transpose(1, 2).flatten(0, 1) for given in (query, key, value)]
        mixed: Any = CausalAttention.apply(*flat, lengths, scale)
        return mixed.view(batch, time, heads, width), None
    if packed and _has_varlen(key, value):
        return _as_they_lie((query, key, value), lengths, scale), None
    if packed:
        return _side_by_side(module, (query, key, value), lengths, kwargs), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _has_varlen(key: Tensor, value: Tensor) -> bool:
    """Whether the kernel of torch's ``varlen_attn``, FlashAttention's, takes such heads."""
    width, halves = value.shape[-1], (torch.bfloat16, torch.float16)
    fits = width == key.shape[-1] and width % 8 == 0 and width <= 256
    return fits and value.device.type == "cuda" and value.dtype in halves


def _as_they_lie(
    packed: tuple[Tensor, ...], lengths: list[int], scale: float
) -> Float[Tensor, "1 tokens heads width"]:
    """Packed sequences by a kernel that is told where each ends: no padding, and no mask."""
    *_, value = packed
    query, key, value = (given[0].transpose(0, 1).to(value.dtype) for given in packed)
    ends, longest = _ends(tuple(lengths), value.device), max(lengths)
    causal = {"window_size": (-1, 0), "enable_gqa": True}
    mixed: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, **causal)
    return mixed[None]


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Int32[Tensor, " ends"]:
    """0, and where each sequence ends; sent to the device for the first layer of a pass alone."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def _side_by_side(
    module: nn.Module, packed: tuple[Tensor, ...], lengths: list[int], kwargs: dict[str, Any]
) -> Float[Tensor, "1 tokens heads width"]:
    """Packed sequences as a padded batch, in one call: what follows a sequence is never seen."""
    padded = (
        pad_sequence(list(given[0].transpose(0, 1).split(lengths)), batch_first=True)
        for given in packed
    )
    query, key, value = (given.transpose(1, 2) for given in padded)
    mixed, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
    return _end_to_end(mixed, lengths)[None]


# Which kernel is called is decided by the numbers in a mask: no compiler can look through that.
AttentionInterface.register(NAME, torch.compiler.disable(grouped_sdpa))
AttentionMaskInterface.register(NAME, sdpa_mask)


class CausalAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V over the positions of a sequence up to each query's own.

    With P the softmax and O = P V, the gradients are

        dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))
        dQ = scale dS K    dK = scale dS^T Q

    P is made again in the backward pass, so memory grows with the length, not with its square. The
    scores are rounded to the precision of the products; dK and dV are summed in fp32.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(
        ctx: Any,
        query: Float[Tensor, "tokens heads width"],
        key: Float[Tensor, "tokens shared width"],
        value: Float[Tensor, "tokens shared width"],
        lengths: list[int],
        scale: float,
    ) -> Float[Tensor, "tokens heads width"]:
        """Of sequences of ``lengths``, end to end; no work is wasted if the longest come first."""
        query = query.unflatten(1, (key.shape[1], -1))
        queries = _groups(query, lengths)
        keys, values = (_groups(given.unsqueeze(2), lengths, BLOCK) for given in (key, value))
        mixed = query.new_empty(len(lengths), max(lengths), *query.shape[1:])
        for block in _blocks(lengths, *query.shape[1:3]):
            block.write(_weights(queries, keys, block, scale) @ values[block.seen], mixed)
        ctx.save_for_backward(queries, keys, values)
        ctx.lengths, ctx.shape, ctx.scale = lengths, mixed.shape, scale
        return _end_to_end(mixed, lengths).flatten(1, 2)

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        queries, keys, values = ctx.saved_tensors
        lengths, (_, _, shared, together, _) = ctx.lengths, ctx.shape
        gradients = _groups(gradient.unflatten(1, (shared, together)), lengths)
        to_queries = queries.new_empty(ctx.shape)
        to_keys, to_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for block in _blocks(lengths, shared, together):
            weights = _weights(queries, keys, block, ctx.scale)
            outer = gradients[block.rows]
            to_values[block.seen] += weights.mT @ outer
            to_weights = outer @ values[block.seen].mT
            to_scores = softmax_backward(to_weights, weights, -1, weights.dtype)
            to_keys[block.seen] += to_scores.mT @ queries[block.rows]
            block.write(_product(to_scores, keys[block.seen], ctx.scale), to_queries)
        to_keys *= ctx.scale
        shared_heads = (
            _end_to_end(x.to(queries.dtype).unflatten(0, (-1, shared)).transpose(1, 2), lengths)
            for x in (to_keys, to_values)
        )
        return _end_to_end(to_queries, lengths).flatten(1, 2), *shared_heads, None, None


@dataclass(frozen=True)
class _Block:
    """Some positions of all sequences up to the last that reaches them.

    A group is the heads of a sequence that share keys; its queries are rows, position by position.
    """

    sequences: int
    start: int
    stop: int
    shared: int
    together: int

    @property
    def rows(self) -> tuple[slice, slice]:
        """Of the queries, in all groups'."""
        rows = slice(self.together * self.start, self.together * self.stop)
        return slice(self.sequences * self.shared), rows

    @property
    def seen(self) -> tuple[slice, slice]:
        """Of the keys: up to the block's end."""
        return slice(self.sequences * self.shared), slice(self.start + BLOCK)

    def write(
        self,
        rows: Float[Tensor, "groups rows width"],
        into: Float[Tensor, "sequences time shared together width"],
    ) -> None:
        place = into[: self.sequences, self.start : self.stop].transpose(1, 2)
        place.copy_(rows.view(place.shape))


def _blocks(lengths: list[int], shared: int, together: int) -> Iterator[_Block]:
    for start in range(0, max(lengths), BLOCK):
        reaching = [place for place, length in enumerate(lengths) if length > start]
        stop = min(start + BLOCK, max(lengths))
        yield _Block(
            sequences=reaching[-1] + 1, start=start, stop=stop, shared=shared, together=together
        )


def _groups(
    given: Float[Tensor, "tokens shared together width"], lengths: list[int], multiple: int = 1
) -> Float[Tensor, "groups rows width"]:
    """One sequence beside the other, with zeros up to a ``multiple`` of positions."""
    _, shared, together, width = given.shape
    longest = max(lengths) + -max(lengths) % multiple
    groups = given.new_empty(len(lengths), shared, longest, together, width)
    for group, part in zip(groups, given.split(lengths), strict=True):
        group[:, : len(part)] = part.transpose(0, 1)
        group[:, len(part) :] = 0
    return groups.view(-1, longest * together, width)


def _end_to_end(
    padded: Float[Tensor, "sequences time ..."], lengths: list[int]
) -> Float[Tensor, "tokens ..."]:
    if min(lengths) == padded.shape[1]:
        return padded.flatten(0, 1)
    return torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])


def _product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """``scale * one @ other``, rounded once."""
    return torch.baddbmm(one.new_empty(1, 1, 1), one, other, beta=0, alpha=scale)


def _weights(
    queries: Float[Tensor, "groups rows width"],
    keys: Float[Tensor, "groups positions width"],
    block: _Block,
    scale: float,
) -> Float[Tensor, "reaching queries seen"]:
    """Attention weights of a block's queries over all keys up to its end."""
    scores = _product(queries[block.rows], keys[block.seen].mT, scale)
    later = scores.new_full((block.stop - block.start, BLOCK), -torch.inf).triu_(1)
    scores.unflatten(1, (-1, block.together))[..., block.start :] += later.unsqueeze(1)
    return scores.softmax(-1)
