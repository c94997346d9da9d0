"""Keys and values while text is written: kept where they are, read without copies.

Both change speed alone. transformers' own cache copies the whole past at every token, and its
attention copies each head of keys and values once per query head as soon as rows are padded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "promptkd_grouped_sdpa"


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One new token per row: the queries that share a head of keys are the rows of one product.

    Args:
        query: (batch, heads, time, width).
        key: (batch, shared heads, positions, width), as ``value``.
        attention_mask: (batch, 1, time, positions).

    Returns:
        (batch, time, heads, width); equal to ``sdpa_attention_forward``, which does the rest.
    """
    batch, heads, time, width = query.shape
    shared = key.shape[1]
    if time > 1 or heads == shared or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = query.reshape(batch, shared, heads // shared, width)
    mixed = scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling")
    )
    return mixed.reshape(batch, 1, heads, width), None


AttentionInterface.register(GROUPED, grouped_sdpa)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped_attention(module: PreTrainedModel) -> Iterator[None]:
    """Within it, a model that attends by torch's kernels does so by ``grouped_sdpa``."""
    if module.config._attn_implementation != "sdpa":
        yield
        return
    module.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        module.set_attn_implementation("sdpa")


class _ReservedLayer(DynamicLayer):
    """Keys and values in room reserved once: a new token's are written, the past is not moved."""

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self._room: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._room = [
            new.new_empty(*new.shape[:-2], self._capacity, new.shape[-1])
            for new in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., past:length, :] = new
        return self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self._room = [room[indices] for room in self._room]
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[..., :length, :] for room in self._room)
        return self.keys, self.values


def reserved_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """A cache of ``capacity`` positions; layers that forget (sliding windows) keep their own."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
