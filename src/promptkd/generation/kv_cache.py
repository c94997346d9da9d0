"""Preallocated KV cache: new entries are written in place.

transformers' own cache copies the whole past at every token.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class _ReservedLayer(DynamicLayer):
    """Keys and values in memory allocated once: new ones are written, the past is not moved."""

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        length = self.get_seq_length()
        self._room = [room[beam_idx] for room in self._room]
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
