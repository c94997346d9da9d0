"""Generating responses, token by token, with key-value caches.

Sampling is a function of (model, request, seed) alone: every request draws its own uniform numbers,
so batch size, batch order and number of ranks don't change what is written (beyond float noise).
A row whose response has ended is given to the next request; see ``decoder``.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from promptkd.generation.decoder import Decoder, Past, Queue, Tokens, histories
from promptkd.generation.kv_cache import is_plain
from promptkd.generation.responses_bar import Progress, ReportsProgress, unseen
from promptkd.generation.sampling import GenerationSettings, TokenSampler
from promptkd.generation.slots import Slots
from promptkd.kernels.matmul import GenerationMatmuls
from promptkd.models.language_model import LanguageModel


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
            max_batch_tokens: rows x (request + response) written at once; bounds the caches, beside
                which requests lie that are read meanwhile.
        """
        told = (co_generator and co_generator.requests) or requests
        lengths = [max(map(len, pair)) for pair in zip(requests, told, strict=True)]
        responses: dict[int, Response] = {}
        products, room = GenerationMatmuls(), decoding.max_new_tokens
        others = [co_generator.model] if co_generator else []
        with self._current() as model, products.within(*(m.module for m in (model, *others))):
            refills = all(is_plain(each.module) for each in (model, *others))
            for group, num_rows in _groups(lengths, room, max_batch_tokens, refills):
                texts = [tuple(read[i] for i in group) for read in (requests, told)]
                first = Queue(
                    texts[0], num_rows=num_rows, room=room, soft_prompt=soft_prompt, prefix=prefix
                )
                queues = [first, *(Queue(texts[1], num_rows=num_rows, room=room) for _ in others)]
                models = zip((model, *others), queues, strict=True)
                decoders = [Decoder(each, products, queue) for each, queue in models]
                share = co_generator and co_generator.share
                written = self._write(
                    decoders, texts[0], [seeds[i] for i in group], decoding, share
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

    def _write(
        self,
        decoders: Sequence[Decoder],
        requests: Sequence[Tokens],
        seeds: Sequence[Sequence[int]],
        decoding: GenerationSettings,
        share: float | None,
    ) -> list[Response]:
        """Responses by one model, or by two whose probabilities are mixed by the ``share``."""
        sampler, most = TokenSampler(decoding), decoding.max_new_tokens
        uniforms = torch.stack([sampler.uniforms(seed) for seed in seeds])
        scores = [decoder.start() for decoder in decoders]
        stop = frozenset(self.stop_ids.tolist())
        slots = Slots(len(requests), len(scores[0]), max_new_tokens=most, stop=stop)
        noted = [] if share is None else [*decoders, sampler]
        logprobs = [[list[float]() for _ in requests] for _ in noted]
        while True:
            numbers = uniforms[slots.requests, slots.times].to(scores[0].device)
            laws = scores if share is None else [each.log_softmax(-1) for each in scores]
            mixed = laws[0] if share is None else _mixture(*laws, share)
            history = None
            if sampler.reads_history:
                texts = [(*requests[i], *slots.token_ids[i]) for i in slots.requests]
                history = histories(texts, mixed.device)
            law = sampler.warp(mixed, history)
            chosen = sampler.choose(law, numbers)
            tokens = chosen.tolist()  # read once: the host waits for a GPU here
            if share is not None:
                own = [each.gather(-1, chosen[:, None])[:, 0] for each in laws]
                _note(logprobs, slots, [*own, sampler.logprobs_of(chosen, law)])
            parts, ended = len(slots.live), slots.append(tokens)
            parts += sum(most - len(slots.token_ids[slots.requests[row]]) for row in ended)
            self.progress(parts / most)
            if not slots.live and not slots.num_waiting:
                return _responses(slots.token_ids, logprobs)
            for decoder in decoders:
                decoder.read(chosen)
            if ended:
                _hand_over(slots, decoders)
            scores = [decoder.step() for decoder in decoders]


def _groups(
    lengths: Sequence[int], room: int, max_batch_tokens: int, refills: bool
) -> Iterator[tuple[list[int], int]]:
    """Requests that are written one after the other, the longest first, and in how many rows.

    Where rows can be refilled, it is one group; else each has as many requests as rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        longest = lengths[order[0]] + room
        num_rows = min(len(order), max(1, max_batch_tokens // longest))
        cut = len(order) if refills else num_rows
        yield order[:cut], num_rows
        order = order[cut:]


def _hand_over(slots: Slots, decoders: Sequence[Decoder]) -> None:
    """Free rows go to the next requests; where nobody waits, they leave."""
    free, started = slots.free, slots.refill()
    kept = slots.leave(min(decoder.worth_leaving for decoder in decoders))
    for decoder in decoders:
        decoder.release(free)
        if started:
            decoder.refill(started)
        if kept:
            decoder.keep(kept)


def _note(logprobs: list[list[list[float]]], slots: Slots, chosen: Sequence[Tensor]) -> None:
    """Append what each noted law says of the tokens just chosen, one per live row."""
    for of_law, values in zip(logprobs, chosen, strict=True):
        of_row = values.tolist()
        for row in slots.live:
            of_law[slots.requests[row]].append(of_row[row])


def _mixture(
    own: Float[Tensor, "rows vocab"], other: Float[Tensor, "rows vocab"], share: float
) -> Float[Tensor, "rows vocab"]:
    """log((1 - share) exp(own) + share exp(other))."""
    weights = torch.tensor([1 - share, share]).log()
    return torch.logaddexp(weights[0] + own, weights[1] + other)


def _responses(
    token_ids: Sequence[list[int]], logprobs: Sequence[list[list[float]]]
) -> list[Response]:
    """With logprobs where there are those of two models."""
    columns = [map(tuple, of_law) for of_law in (token_ids, *logprobs)]
    return [Response(*row) for row in zip(*columns, strict=True)]


def _forget_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
