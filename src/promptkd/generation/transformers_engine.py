"""Generating responses, token by token, with key-value caches.

Sampling is a function of (model, request, seed) alone: every request draws its own uniform numbers,
so batch size, batch order and number of ranks don't change what is written (beyond float noise).
"""

import copy
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from promptkd.generation.kv_cache import reserved_cache
from promptkd.generation.responses_bar import Progress, ReportsProgress, unseen
from promptkd.generation.sampling import GenerationSettings, TokenSampler
from promptkd.kernels.matmul import GenerationMatmuls
from promptkd.models.language_model import PADDING, LanguageModel, prompt_positions, put_in_front

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """What was written; the logprobs (nats) are there when two models wrote together."""

    token_ids: Tokens
    student_logprobs: tuple[float, ...] = ()
    teacher_logprobs: tuple[float, ...] = ()
    sampling_logprobs: tuple[float, ...] = ()

    def annotations(self) -> dict[str, tuple[float, ...]]:
        """The logprobs by name, if there are any."""
        if not self.student_logprobs:
            return {}
        return {
            "student_logprobs": self.student_logprobs,
            "teacher_logprobs": self.teacher_logprobs,
            "sampling_logprobs": self.sampling_logprobs,
        }


@dataclass(frozen=True)
class CoGenerator:
    """A second model whose next-token probabilities are mixed in with weight ``share``.

    Attributes:
        requests: as this model reads them, in the order of the other's; None: as the other does.
    """

    model: LanguageModel
    share: float
    requests: tuple[Tokens, ...] | None = None

    def of(self, rows: Sequence[int]) -> "CoGenerator":
        """For some of the requests."""
        if self.requests is None:
            return self
        return replace(self, requests=tuple(self.requests[row] for row in rows))


@runtime_checkable
class Past(Protocol):
    """Keys and values that a number of rows have in front of their text."""

    def cache(self, batch: int) -> DynamicCache: ...


@runtime_checkable
class Engine(ReportsProgress, Protocol):
    """Whatever generates one response per request, in order; a function of weights and seeds."""

    @property
    def stop_ids(self) -> Tensor: ...

    def generate(
        self,
        requests: Sequence[Tokens],
        seeds: Sequence[Sequence[int]],
        decoding: GenerationSettings,
    ) -> list[Response]: ...


class TransformersEngine:
    """Generates with the model's own weights: a copy to keep in step in mixed precision alone."""

    def __init__(self, model: LanguageModel, stop_ids: Sequence[int]):
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self.progress: Progress = unseen
        self._model = model
        self._working_copy: LanguageModel | None = None
        if model.dtype != model.module.dtype:
            module: Any = copy.deepcopy(model.module)
            module.to(model.dtype).requires_grad_(False)
            self._working_copy = replace(model, module=module)
            _forget_weights(module)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Tokens],
        seeds: Sequence[Sequence[int]],
        decoding: GenerationSettings,
        *,
        soft_prompt: Tensor | None = None,
        prefix: Past | None = None,
        co_generator: CoGenerator | None = None,
        max_batch_tokens: int = 32768,
    ) -> list[Response]:
        """One response per request, in the order of the requests.

        Args:
            requests: token ids.
            seeds: one seed per request: any short sequence of non-negative integers.
            decoding: how tokens are chosen.
            soft_prompt: vectors in front of every request.
            prefix: keys and values in front of every request.
            co_generator: a second model whose probabilities are mixed in.
            max_batch_tokens: rows x (request + response) written at once; bounds the caches.
        """
        others_read = (co_generator and co_generator.requests) or requests
        lengths = [max(map(len, pair)) for pair in zip(requests, others_read, strict=True)]
        order = sorted(range(len(requests)), key=lambda i: lengths[i], reverse=True)
        responses: dict[int, Response] = {}
        others = [co_generator.model.module] if co_generator else []
        products = GenerationMatmuls()
        with self._current() as model, products.within(model.module, *others):
            while order:
                longest = lengths[order[0]] + decoding.max_new_tokens
                rows = max(1, max_batch_tokens // longest)
                group, order = order[:rows], order[rows:]
                written = self._generate_group(
                    model,
                    products,
                    [requests[i] for i in group],
                    [seeds[i] for i in group],
                    decoding,
                    soft_prompt,
                    prefix,
                    co_generator.of(group) if co_generator else None,
                )
                responses.update(zip(group, written, strict=True))
        return [responses[i] for i in range(len(requests))]

    @contextmanager
    def _current(self) -> Iterator[LanguageModel]:
        """The model as it is now; in mixed precision a copy, which has weights only meanwhile."""
        model = self._working_copy or self._model
        learning = model.module.training
        model.module.eval()  # in training mode, gradient checkpointing drops the cache silently
        if model is not self._model:
            own, learnt = model.module.parameters(), self._model.module.parameters()
            for ours, theirs in zip(own, learnt, strict=True):
                ours.data = theirs.detach().to(model.dtype)
        yield model
        if model is not self._model:
            _forget_weights(model.module)
        model.module.train(learning)

    def _co_decoders(
        self,
        co_generator: CoGenerator | None,
        products: GenerationMatmuls,
        requests: list[Tokens],
        room: int,
    ) -> "list[_Decoder]":
        if co_generator is None:
            return []
        read = co_generator.requests or requests
        return [_Decoder(co_generator.model, products, read, room=room)]

    def _generate_group(
        self,
        model: LanguageModel,
        products: GenerationMatmuls,
        requests: list[Tokens],
        seeds: list[Sequence[int]],
        decoding: GenerationSettings,
        soft_prompt: Tensor | None,
        prefix: Past | None,
        co_generator: CoGenerator | None,
    ) -> list[Response]:
        sampler, room = TokenSampler(decoding), decoding.max_new_tokens
        uniforms = torch.stack([sampler.uniforms(seed) for seed in seeds]).to(model.device)
        past = prefix.cache(len(requests)) if prefix else None
        first = _Decoder(model, products, requests, soft_prompt=soft_prompt, past=past, room=room)
        decoders = [first, *self._co_decoders(co_generator, products, requests, room)]
        history = first.tokens.masked_fill(~first.mask, PADDING)  # padding is part of no n-gram
        stop = frozenset(self.stop_ids.tolist())
        rows, token_ids = [*range(len(requests))], [list[int]() for _ in requests]  # live rows
        share_of_token, noted = len(requests) / room, [*decoders, sampler] if co_generator else []
        logprobs: list[list[list[float]]] = [[[] for _ in requests] for _ in noted]
        for time in range(room):
            laws = [decoder.next_scores() for decoder in decoders]
            if co_generator:
                laws = [scores.log_softmax(-1) for scores in laws]
            mixed = _mixture(*laws, co_generator.share) if co_generator else laws[0]
            law = sampler.warp(mixed, history)
            chosen = sampler.choose(law, uniforms[:, time])
            tokens = chosen.tolist()  # read once: the host waits for a GPU here
            for row, token in zip(rows, tokens, strict=True):
                token_ids[row].append(token)
            if co_generator:
                own = [scores.gather(-1, chosen[:, None])[:, 0] for scores in laws]
                _note(logprobs, rows, [*own, sampler.logprobs_of(chosen, law)])
            going_on = [place for place, token in enumerate(tokens) if token not in stop]
            self.progress(share_of_token)
            if not going_on:
                break
            history = torch.cat([history, chosen[:, None]], dim=1)
            for decoder in decoders:
                decoder.read(chosen)
            if len(going_on) <= 0.75 * len(rows):  # finished rows leave; moving caches costs
                rows = [rows[place] for place in going_on]
                keep = torch.tensor(going_on, device=model.device)
                uniforms, history = uniforms[keep], history[keep]
                for decoder in decoders:
                    decoder.keep(keep)
        self.progress(len(requests) - share_of_token * max(map(len, token_ids)))
        return _responses(token_ids, logprobs, stop)


def _note(logprobs: list[list[list[float]]], rows: Sequence[int], chosen: Sequence[Tensor]) -> None:
    """Append what each noted law says of the tokens just chosen, one per live row."""
    for of_law, values in zip(logprobs, chosen, strict=True):
        for row, value in zip(rows, values.tolist(), strict=True):
            of_law[row].append(value)


def _mixture(
    own: Float[Tensor, "rows vocab"], other: Float[Tensor, "rows vocab"], share: float
) -> Float[Tensor, "rows vocab"]:
    """log((1 - share) exp(own) + share exp(other))."""
    weights = torch.tensor([1 - share, share]).log()
    return torch.logaddexp(weights[0] + own, weights[1] + other)


def _responses(
    token_ids: list[list[int]], logprobs: list[list[list[float]]], stop: Container[int]
) -> list[Response]:
    """Each up to its stop token; with logprobs where there are those of two models."""
    ended = [_cut_after_stop(ids, stop) for ids in token_ids]
    if not logprobs:
        return [Response(ids) for ids in ended]
    return [
        Response(ids, *(tuple(values[: len(ids)]) for values in noted))
        for ids, *noted in zip(ended, *logprobs, strict=True)
    ]


class _Decoder:
    """One model, its requests and its cache, while a group of responses is written.

    Attributes:
        tokens: what it has not read yet: its requests, later the token chosen last.
        mask: true at the real tokens among all so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        products: GenerationMatmuls,
        requests: Sequence[Tokens],
        *,
        room: int,
        soft_prompt: Tensor | None = None,
        past: DynamicCache | None = None,
    ):
        self.model = model
        self.products = products
        self.soft_prompt = soft_prompt
        self.tokens, self.mask = left_pad(requests, model.device)
        front = 0 if soft_prompt is None else len(soft_prompt)
        capacity = self.tokens.shape[1] + room
        self.cache = reserved_cache(model.module.config, front + capacity) if past is None else past
        self.past_length = self.cache.get_seq_length()
        self.head = model.head

    def next_scores(self) -> Float[Tensor, "rows vocab"]:
        """Log-probabilities up to a constant per row, which choosing a token doesn't see."""
        hidden = self._advance(self.tokens, self.mask).to(self.head.dtype)
        return self.head.cap(self.products.linear(hidden, *self.head.matrix))

    def _advance(self, tokens: Tensor, mask: Tensor) -> Float[Tensor, "rows width"]:
        first = self.cache.get_seq_length() == self.past_length
        arguments: dict[str, Any] = {"input_ids": tokens}
        new = tokens.shape[1]
        if self.soft_prompt is not None:
            of_prompt, mask = prompt_positions(mask, len(self.soft_prompt))
            if first:
                embeddings = self.model.module.get_input_embeddings()(tokens)
                embeddings = put_in_front(self.soft_prompt, embeddings, of_prompt)
                arguments, new = {"inputs_embeds": embeddings}, embeddings.shape[1]
        full_mask = F.pad(mask, (self.past_length, 0), value=True).long()
        positions = (full_mask.cumsum(-1) - 1).clamp_min(0)
        trunk: Any = self.model.module.base_model
        with self.model.autocast():
            output = trunk(
                **arguments,
                attention_mask=full_mask,
                position_ids=positions[:, -new:],
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.last_hidden_state[:, -1]

    def read(self, chosen: Tensor) -> None:
        """The tokens that were chosen come next."""
        self.tokens = chosen[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(chosen), 1)], dim=1)

    def keep(self, rows: Tensor) -> None:
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]
        self.cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


def _forget_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def left_pad(requests: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Requests side by side, ending together: (rows, width) token ids, and true at real tokens."""
    width = max(len(request) for request in requests)
    tokens = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros(len(requests), width, dtype=torch.bool)
    for row, request in enumerate(requests):
        tokens[row, width - len(request) :] = torch.tensor(request)
        mask[row, width - len(request) :] = True
    return tokens.to(device), mask.to(device)


def _cut_after_stop(ids: list[int], stop: Container[int]) -> Tokens:
    for position, token in enumerate(ids):
        if token in stop:
            return tuple(ids[: position + 1])
    return tuple(ids)
