"""One pass over given responses: what models say about each of their tokens, in nats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptkd.divergences import LogProbs, PerToken, reverse_kl
from promptkd.micro_batches import split_by_length
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.objectives import States, accumulate
from promptkd.rollouts import Rollout


@dataclass(frozen=True)
class Reader:
    """A model that reads the responses, with or without a soft prompt in front of them."""

    model: LanguageModel
    soft_prompt: Float[Tensor, "length width"] | None = None

    def packs(self, longest: int) -> bool:
        front = 0 if self.soft_prompt is None else len(self.soft_prompt)
        return self.model.packs(longest + front)


Losses: TypeAlias = Callable[
    [Mapping[str, LogProbs], Int[Tensor, " tokens"]], Mapping[str, PerToken]
]
"""From log-probabilities by reader, and the response's own tokens, to nats per token by loss."""


@torch.no_grad()
def token_losses(
    rollouts: Sequence[Rollout],
    readers: Mapping[str, Reader],
    losses: Losses,
    micro_batch_tokens: int,
    select: Callable[[Tensor, Tensor], Tensor] = select_responses,
) -> dict[str, list[PerToken]]:
    """Named losses at every response token: one fp64 vector per rollout, in the rollouts' order.

    Args:
        rollouts: any number of them, in any order.
        readers: by name, all on one device.
        losses: what is measured.
        micro_batch_tokens: tokens per forward pass.
        select: which hidden states are scored.
    """
    placed = [replace(rollout, index=place) for place, rollout in enumerate(rollouts)]
    device = next(iter(readers.values())).model.device
    longest = max((rollout.num_tokens for rollout in rollouts), default=0)
    packed = all(reader.packs(longest) for reader in readers.values())
    found: dict[str, dict[int, PerToken]] = {}
    for batch in split_by_length(placed, micro_batch_tokens, device, packed=packed):
        states = {
            name: States(
                select(
                    reader.model.hidden_states(batch.tokens, reader.soft_prompt),
                    batch.response_mask,
                ),
                reader.model.head,
                learns=False,
            )
            for name, reader in readers.items()
        }
        ids, lengths = batch.response_ids, [len(r.response_ids) for r in batch.rollouts]

        def of_tile(logprobs: Mapping[str, LogProbs], tile: slice, ids: Tensor = ids):
            return losses(logprobs, ids[tile])

        for name, values in accumulate(states, of_tile, {}).items():
            pieces = values.double().cpu().split(lengths)
            for rollout, piece in zip(batch.rollouts, pieces, strict=True):
                found.setdefault(name, {})[rollout.index] = piece
    return {name: [by_place[i] for i in range(len(placed))] for name, by_place in found.items()}


@dataclass(frozen=True)
class LossSums:
    """Sums over response tokens, which ranks can add up before a mean is taken.

    Attributes:
        cross_entropy: of -log q, nats.
        reverse_kl: of KL(q || p), nats; 0 without a teacher.
        count: of response tokens.
    """

    cross_entropy: float = 0.0
    reverse_kl: float = 0.0
    count: float = 0.0

    @property
    def mean_cross_entropy(self) -> float:
        return self.cross_entropy / self.count

    @property
    def mean_reverse_kl(self) -> float:
        return self.reverse_kl / self.count


def loss_sums(
    rollouts: Sequence[Rollout],
    student: LanguageModel,
    teacher: LanguageModel | None,
    micro_batch_tokens: int,
) -> LossSums:
    """-log q and, with a teacher, KL(q || p), summed over all response tokens.

    KL(q || p) on responses the student wrote is how far the student is from the plain teacher.
    """
    models = {"student": student} | ({"teacher": teacher} if teacher else {})

    def losses(logprobs: Mapping[str, LogProbs], tokens: Int[Tensor, " tokens"]):
        own = logprobs["student"]
        values = {"cross_entropy": -own.gather(-1, tokens[:, None])[:, 0]}
        if "teacher" in logprobs:
            values["reverse_kl"] = reverse_kl(own, logprobs["teacher"])
        return values

    readers = {name: Reader(model) for name, model in models.items()}
    found = token_losses(rollouts, readers, losses, micro_batch_tokens)
    sums = {name: sum(nats.sum().item() for nats in rows) for name, rows in found.items()}
    return LossSums(**sums, count=sum(len(rollout.response_ids) for rollout in rollouts))
