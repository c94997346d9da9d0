"""One model, the rows it writes, and their keys and values, from one token to the next.

All rows share an axis of columns, and every text ends in the last: what stands before it is masked,
and positions count real columns. So a row that has ended can go to another request at any time: its
keys and values are copied into the columns before the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from promptkd.generation.decode_graph import FixedSteps, fits
from promptkd.generation.kv_cache import is_plain, move_left, place, reserved_cache
from promptkd.kernels.matmul import GenerationMatmuls
from promptkd.models.language_model import PADDING, LanguageModel, prompt_positions, put_in_front

Tokens = tuple[int, ...]


@runtime_checkable
class Past(Protocol):
    """Keys and values that a number of rows have in front of their text."""

    def cache(self, batch: int) -> DynamicCache: ...


@dataclass(frozen=True)
class Queue:
    """Requests that one model answers in a number of rows.

    Attributes:
        requests: token ids; rows take them in this order.
        num_rows: written at once.
        room: new tokens of a response at most.
        soft_prompt: vectors in front of every request.
        prefix: keys and values in front of every request.
    """

    requests: Sequence[Tokens]
    num_rows: int
    room: int
    soft_prompt: Tensor | None = None
    prefix: Past | None = None


class Decoder:
    """A model in the middle of generating."""

    def __init__(self, model: LanguageModel, products: GenerationMatmuls, queue: Queue):
        self._model, self._products, self._head = model, products, model.head
        self._queue, self._waiting = queue, queue.requests[queue.num_rows :]

    @property
    def worth_leaving(self) -> float:
        """The share of rows that go on from which on the others may leave.

        Moving caches costs; fixed shapes have to be made ready anew.
        """
        return 0.5 if self._fixed else 0.75

    def start(self) -> Float[Tensor, "rows vocab"]:
        """Read the first requests; scores are log-probabilities up to a constant per row."""
        given = self._queue
        past = given.prefix.cache(given.num_rows) if given.prefix else None
        longest = max(map(len, given.requests))
        inputs, real = self._inputs(given.requests[: given.num_rows], longest, past)
        self._columns, self._front = real.shape[1], real.shape[1] - longest
        self._starts = given.num_rows * [0]  # the first column that a row's text may have
        capacity = self._columns + given.room
        self._cache = reserved_cache(self._model.module.config, capacity, past)
        self._tokens = torch.zeros(given.num_rows, 1, dtype=torch.long, device=real.device)
        self._mask = F.pad(real, (0, given.room), value=False)
        self._fixed = self._fixed_steps()
        return self._scores(inputs, real, self._cache)

    def read(self, chosen: Int[Tensor, " rows"]) -> None:
        """The tokens that were chosen come next."""
        self._tokens.copy_(chosen[:, None])

    def step(self) -> Float[Tensor, "rows vocab"]:
        """Scores of what follows the tokens that come next; valid until the next step."""
        if self._columns == self._mask.shape[1]:
            self._move_left()
        column = self._columns
        self._columns += 1
        self._mask[:, column] = True
        if self._fixed is not None:
            return self._fixed(column)
        return self._decode(self._tokens, self._mask[:, : self._columns], self._cache)

    def release(self, rows: Sequence[int]) -> None:
        """The texts of some rows have ended: what is still written there starts from nothing.

        So positions stay below those of a whole text, and columns aren't kept for it.
        """
        self._mask[rows] = False
        for row in rows:
            self._starts[row] = self._columns

    def refill(self, rows: Sequence[int]) -> None:
        """Give rows to the next requests; their last tokens come next, as the others' chosen."""
        requests, self._waiting = self._waiting[: len(rows)], self._waiting[len(rows) :]
        past = self._queue.prefix.cache(len(rows)) if self._queue.prefix else None
        inputs, real = self._inputs(requests, max(map(len, requests)), past)
        inputs, real = {name: given[:, :-1] for name, given in inputs.items()}, real[:, :-1]
        where, width = torch.tensor(rows, device=real.device), real.shape[1]
        first, last = self._columns - width, [request[-1] for request in requests]
        if width:
            cache = reserved_cache(self._model.module.config, width, past)
            if next(iter(inputs.values())).shape[1]:
                self._hidden(inputs, real, cache)
            place(self._cache, where, cache, end=self._columns)
        self._mask[where] = False
        self._mask[where, first : self._columns] = real
        self._tokens[where, 0] = torch.tensor(last, device=real.device)
        for row in rows:
            self._starts[row] = first
        self._move_left_if_worthwhile()

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows leave."""
        where = torch.tensor(rows, device=self._mask.device)
        self._tokens, self._mask = self._tokens[where], self._mask[where]
        self._starts = [self._starts[row] for row in rows]
        self._cache.reorder_cache(where)  # pyright: ignore[reportArgumentType]
        self._fixed = self._fixed_steps()
        if is_plain(self._model.module):
            self._move_left_if_worthwhile()

    def _fixed_steps(self) -> FixedSteps | None:
        if not fits(self._model):
            return None
        return FixedSteps(self._decode, tokens=self._tokens, mask=self._mask, cache=self._cache)

    def _decode(
        self, tokens: Int[Tensor, "rows one"], real: Bool[Tensor, "rows columns"], cache: Any
    ) -> Float[Tensor, "rows vocab"]:
        return self._scores({"input_ids": tokens}, real, cache)

    @property
    def _unused(self) -> int:
        """Columns at the front that are nobody's, and that no waiting request needs.

        There is one when none is left at the end: the longest text has as many columns as there
        are, without that of the token that ends it.
        """
        longest = max(map(len, self._waiting), default=0)
        return min(*self._starts, self._columns - self._front - longest)

    def _move_left_if_worthwhile(self) -> None:
        """Attention runs over all columns, also over those that are nobody's any more."""
        if 4 * self._unused >= self._columns:
            self._move_left()

    def _move_left(self) -> None:
        by, length = self._unused, self._columns
        move_left(self._cache, by, length)
        self._mask[:, : length - by] = self._mask[:, by:length].clone()
        self._mask[:, length - by :] = False
        self._starts = [start - by for start in self._starts]
        self._columns -= by

    def _inputs(
        self, requests: Sequence[Tokens], width: int, past: DynamicCache | None
    ) -> tuple[dict[str, Tensor], Bool[Tensor, "rows columns"]]:
        """What the trunk is given of requests, and which columns are real, those of a past too."""
        tokens, real = left_pad(requests, self._model.device, width)
        inputs = {"input_ids": tokens}
        if self._queue.soft_prompt is not None:
            of_prompt, real = prompt_positions(real, len(self._queue.soft_prompt))
            embeddings = self._model.module.get_input_embeddings()(tokens)
            inputs = {"inputs_embeds": put_in_front(self._queue.soft_prompt, embeddings, of_prompt)}
        if past is not None:
            real = F.pad(real, (past.get_seq_length(), 0), value=True)
        return inputs, real

    def _scores(
        self, inputs: dict[str, Tensor], real: Tensor, cache: DynamicCache
    ) -> Float[Tensor, "rows vocab"]:
        hidden = self._hidden(inputs, real, cache).to(self._head.dtype)
        return self._head.cap(self._products.linear(hidden, *self._head.matrix))

    def _hidden(
        self, inputs: dict[str, Tensor], real: Tensor, cache: DynamicCache
    ) -> Float[Tensor, "rows width"]:
        """After the last of the inputs, which are the last of the real columns."""
        (given,) = inputs.values()
        attended = real.long()
        positions = (attended.cumsum(-1) - 1).clamp_min(0)[:, -given.shape[1] :]
        trunk: Any = self._model.module.base_model
        with self._model.autocast():
            output = trunk(
                **inputs,
                attention_mask=attended,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return output.last_hidden_state[:, -1]


def left_pad(
    requests: Sequence[Tokens], device: torch.device, width: int | None = None
) -> tuple[Int[Tensor, "rows width"], Bool[Tensor, "rows width"]]:
    """Requests side by side, ending together: token ids, and true at real tokens."""
    width = width or max(len(request) for request in requests)
    tokens = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros(len(requests), width, dtype=torch.bool)
    for row, request in enumerate(requests):
        tokens[row, width - len(request) :] = torch.tensor(request)
        mask[row, width - len(request) :] = True
    return tokens.to(device), mask.to(device)


def histories(texts: Sequence[Tokens], device: torch.device) -> Int[Tensor, "rows width"]:
    """Texts so far, as ``TokenSampler`` reads them; padding is part of no n-gram."""
    tokens, real = left_pad(texts, device)
    return tokens.masked_fill(~real, PADDING)
