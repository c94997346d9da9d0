"""Token sampling shared by all engines, from per-request uniform numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from promptkd.config import SMALLEST_TEMPERATURE, Recipe
from promptkd.errors import NotFinite, UserError

BLOCK = 256
"""Tokens whose probabilities are summed at once before one of them is looked for."""


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen; kept beside every score.

    Attributes:
        max_new_tokens: including the stop token.
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        no_repeat_ngram_size: 0 blocks nothing. The authors' test script blocks repeated 6-grams,
            their validation and training don't.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        warm = SMALLEST_TEMPERATURE <= self.temperature <= 100 or self.temperature == 0
        for name, value, is_right, expected in (
            ("temperature", self.temperature, warm, f"0, or {SMALLEST_TEMPERATURE:g} to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
        ):
            if not is_right:
                raise UserError(f"{name} is {value}: it has to be {expected}.")

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "GenerationSettings":
        """As the recipe's run samples in training and validation, where nothing is blocked."""
        s = recipe.sampling
        return cls(recipe.data.longest_response, s.temperature, s.top_p, s.top_k)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TokenSampler:
    """Greedy, or the inverse of the cumulative distribution at a row's uniform number."""

    def __init__(self, decoding: GenerationSettings):
        self._decoding = decoding
        self.reads_history = decoding.no_repeat_ngram_size > 0
        self._warpers = LogitsProcessorList()
        if self.reads_history:
            self._warpers.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
        if decoding.top_k:
            self._warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))

    def uniforms(self, seed: Sequence[int]) -> Float[Tensor, " time"]:
        """A request's random numbers, one per new token: a function of its seed alone."""
        numbers = np.random.default_rng(seed).random(self._decoding.max_new_tokens)
        return torch.from_numpy(numbers).float()

    def __call__(
        self,
        scores: Float[Tensor, "rows vocab"],
        uniforms: Float[Tensor, " rows"],
        history: Int[Tensor, "rows time"] | None = None,
    ) -> Int[Tensor, " rows"]:
        """A token per row.

        Args:
            scores: log-probabilities up to a constant per row.
            uniforms: from [0, 1), one per row.
            history: tokens so far, padding is negative; needed if ``reads_history``.
        """
        return self.choose(self.warp(scores, history), uniforms)

    def warp(
        self, scores: Float[Tensor, "rows vocab"], history: Int[Tensor, "rows time"] | None = None
    ) -> Float[Tensor, "rows vocab"]:
        """Log-probabilities, up to a constant per row, of the law that tokens are drawn from."""
        if self._decoding.temperature not in (0.0, 1.0):
            scores = scores / self._decoding.temperature
        if self._warpers:
            scores = self._warpers(history, scores)  # pyright: ignore[reportArgumentType]
        return scores

    def logprobs_of(
        self, chosen: Int[Tensor, " rows"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, " rows"]:
        """In nats, under the law that ``scores``, which were warped, stand for; greedy: certain."""
        if self._decoding.temperature == 0:
            return torch.zeros_like(scores[:, 0])
        return scores.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]

    def choose(
        self, scores: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"]
    ) -> Int[Tensor, " rows"]:
        """A token per row, of scores that were warped."""
        if self._decoding.temperature == 0:
            return scores.argmax(-1)
        # Sums of blocks first: a running sum over the whole vocabulary takes six times as long.
        weights = (scores - scores.amax(-1, keepdim=True)).exp_()
        blocks = F.pad(weights, (0, -scores.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        sums = blocks.sum(-1).cumsum(-1)
        threshold = uniforms[:, None] * sums[:, -1:]
        if not torch.isfinite(threshold).all():
            raise NotFinite(
                "What the model says next is NaN or infinite: its weights are too large."
            )
        block = _first_above(sums, threshold)
        threshold = (threshold - F.pad(sums, (1, 0)).gather(1, block)).clamp_min_(0)
        within = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].cumsum(-1)
        return (BLOCK * block + _first_above(within, threshold))[:, 0]


def _first_above(
    sums: Float[Tensor, "rows entries"], threshold: Float[Tensor, "rows 1"]
) -> Int[Tensor, "rows 1"]:
    """The first running sum above the threshold; if rounding left none, the last that grew."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.searchsorted(sums, threshold, right=True).minimum(last)
