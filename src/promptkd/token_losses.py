"""One pass over given responses: what models say about each of their tokens, in nats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptkd.divergences import LogProbs, PerToken, reverse_kl
from promptkd.micro_batches import MicroBatch, idle, split_by_length
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.models.sharding import is_sharded, most
from promptkd.objectives import Places, States, accumulate
from promptkd.rollouts import Rollout

Select: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From hidden states and the responses' mask to the states that are scored."""


@dataclass(frozen=True)
class Reader:
    """A model that reads the responses, with or without a soft prompt in front of them.

    Attributes:
        is_teacher: whether it reads the teacher's requests.
    """

    model: LanguageModel
    soft_prompt: Float[Tensor, "length width"] | None = None
    is_teacher: bool = False

    def packs(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether it pads none of these rows."""
        own = [rollout.for_teacher if self.is_teacher else rollout for rollout in rollouts]
        front = 0 if self.soft_prompt is None else len(self.soft_prompt)
        return self.model.packs(max((rollout.num_tokens for rollout in own), default=0) + front)

    def states(self, batch: MicroBatch, select: Select) -> States:
        """Hidden states at the responses' tokens, without gradient."""
        own = batch.for_teacher if self.is_teacher else batch
        hidden = self.model.hidden_states(own.tokens, self.soft_prompt)
        return States(select(hidden, own.response_mask), self.model.head, learns=False)


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
    select: Select = select_responses,
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
    packed = all(reader.packs(rollouts) for reader in readers.values())
    found: dict[str, dict[int, PerToken]] = {}
    batches = split_by_length(placed, micro_batch_tokens, device, packed=packed)
    if any(is_sharded(reader.model.module) for reader in readers.values()):  # no process goes alone
        batches += (most([len(batches)], device)[0] - len(batches)) * [idle(device)]
    for batch in batches:
        states = {name: reader.states(batch, select) for name, reader in readers.items()}
        ids, lengths = batch.response_ids, [len(r.response_ids) for r in batch.rollouts]

        def of_tile(logprobs: Mapping[str, LogProbs], tile: Places, ids: Tensor = ids):
            return losses(logprobs, ids[tile])

        for name, values in accumulate(states, of_tile, {}).items():
            pieces = values.double().cpu().split(lengths)
            for rollout, piece in zip(batch.rollouts, pieces, strict=True):
                found.setdefault(name, {})[rollout.index] = piece
    return {name: [by_place[i] for i in range(len(placed))] for name, by_place in found.items()}


def cross_entropies(
    rollouts: Sequence[Rollout], model: LanguageModel, micro_batch_tokens: int
) -> list[PerToken]:
    """-log q at every response token, rollout by rollout."""

    def losses(logprobs: Mapping[str, LogProbs], tokens: Int[Tensor, " tokens"]):
        return {"nats": -logprobs["model"].gather(-1, tokens[:, None])[:, 0]}

    found = token_losses(rollouts, {"model": Reader(model)}, losses, micro_batch_tokens)
    return found.get("nats", [])


def distances(
    rollouts: Sequence[Rollout],
    student: LanguageModel,
    teacher: LanguageModel,
    micro_batch_tokens: int,
) -> list[PerToken]:
    """KL(q || p) at every response token, rollout by rollout.

    On responses that the student generated, it is how far the student is from the plain teacher,
    each reading its own requests.
    """
    readers = {"student": Reader(student), "teacher": Reader(teacher, is_teacher=True)}

    def losses(logprobs: Mapping[str, LogProbs], tokens: Int[Tensor, " tokens"]):
        return {"nats": reverse_kl(logprobs["student"], logprobs["teacher"])}

    return token_losses(rollouts, readers, losses, micro_batch_tokens).get("nats", [])
