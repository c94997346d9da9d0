"""Preallocated KV cache: new entries are written in place, and rows change hands.

transformers' own cache copies the whole past at every token.
"""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class _ReservedLayer(DynamicLayer):
    """Keys and values in memory allocated once: new ones are written, the past is not moved."""

    def __init__(self, capacity: int):
        super().__init__()
        self._capacity = capacity
        self.room: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # Zeros: attention over the whole capacity weighs what isn't written with 0, and 0 x NaN
        # is NaN.
        self.room = [
            new.new_zeros(*new.shape[:-2], self._capacity, new.shape[-1])
            for new in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[..., past:length, :] = new
        return self.show(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        length = self.get_seq_length()
        self.room = [room[beam_idx] for room in self.room]
        self.show(length)

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[..., :length, :] for room in self.room)
        return self.keys, self.values


class _FixedLayer(DynamicLayer):
    """The room of a reserved layer up to a fixed column; one token per row is written at a time.

    Args:
        room: keys and values.
        column: where it is written; a tensor, since a captured graph reads it anew each time.
    """

    is_compileable = True  # transformers then asks no tensor whether a mask is needed

    def __init__(self, room: list[Tensor], column: Int[Tensor, " one"]):
        super().__init__()
        self.keys, self.values = room
        self._column = column
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        for room, new in ((self.keys, key_states), (self.values, value_states)):
            room.index_copy_(-2, self._column, new)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[-2], 0

    def get_seq_length(self) -> Any:
        return self._column[0]


def is_plain(module: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values and nothing else.

    Then what a row has read can be copied to another row and other columns. Sliding windows,
    recurrent states and convolutions can't.
    """
    layers = DynamicCache(config=module.config).layers
    return not module._is_stateful and all(type(layer) is DynamicLayer for layer in layers)


def reserved_cache(
    config: PreTrainedConfig, capacity: int, past: DynamicCache | None = None
) -> DynamicCache:
    """A cache of ``capacity`` positions; layers that forget (sliding windows) keep their own.

    Args:
        past: what is in it already.
    """
    cache = DynamicCache(config=config) if past is None else past
    cache.layers = [
        _reserved(layer, capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


def _reserved(layer: DynamicLayer, capacity: int) -> _ReservedLayer:
    made = _ReservedLayer(capacity)
    if layer.keys is not None and layer.values is not None:
        made.update(layer.keys, layer.values)
    return made


def place(cache: DynamicCache, rows: Int[Tensor, " rows"], other: DynamicCache, end: int) -> None:
    """Write all that ``other`` holds into some rows, so that it ends before the column ``end``.

    Both are plain.
    """
    for layer, source in zip(_reserved_layers(cache), _reserved_layers(other), strict=True):
        width = source.get_seq_length()
        for room, new in zip(layer.room, source.room, strict=True):
            room[..., end - width : end, :].index_copy_(0, rows, new[..., :width, :])


def move_left(cache: DynamicCache, by: int, length: int) -> None:
    """Forget the first columns of a plain cache of ``length``; the others begin at 0."""
    for layer in _reserved_layers(cache):
        for room in layer.room:
            room[..., : length - by, :] = room[..., by:length, :].clone()
        layer.show(length - by)


def fixed_view(cache: DynamicCache, extent: int, column: Int[Tensor, " one"]) -> DynamicCache:
    """The first ``extent`` columns of a plain cache, in the same memory; see ``_FixedLayer``."""
    view = DynamicCache()
    for layer in _reserved_layers(cache):
        view.layers.append(_FixedLayer([room[..., :extent, :] for room in layer.room], column))
    return view


def _reserved_layers(cache: DynamicCache) -> Iterator[_ReservedLayer]:
    for layer in cache.layers:
        assert type(layer) is _ReservedLayer
        yield layer
