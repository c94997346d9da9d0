"""Rollouts side by side: how those of a step are cut into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from promptkd.models.language_model import PADDING
from promptkd.rollouts import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts of similar length, right-padded into one rectangle with ``models.PADDING``."""

    rollouts: tuple[Rollout, ...]
    tokens: Int[Tensor, "batch time"]
    response_mask: Bool[Tensor, "batch time"]

    @property
    def response_ids(self) -> Int[Tensor, " tokens"]:
        return self.tokens[self.response_mask]

    def annotation(self, name: str) -> Tensor:
        """One number per response token, in the order of ``response_ids``."""
        values = [value for rollout in self.rollouts for value in rollout.annotations[name]]
        return torch.tensor(values, device=self.tokens.device)

    @cached_property
    def for_teacher(self) -> "MicroBatch":
        """The same responses, in the same order, after the teacher's requests."""
        if all(rollout.teacher_request_ids is None for rollout in self.rollouts):
            return self
        return pad([rollout.for_teacher for rollout in self.rollouts], self.tokens.device)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(rollout.num_tokens for rollout in self.rollouts)


def pad(rollouts: Sequence[Rollout], device: torch.device, length: int = 0) -> MicroBatch:
    """Put rollouts side by side."""
    length = max(length, *(rollout.num_tokens for rollout in rollouts))
    tokens = torch.full((len(rollouts), length), PADDING)
    response_mask = torch.zeros(len(rollouts), length, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.request_ids), rollout.num_tokens
        tokens[row, :end] = torch.tensor(rollout.request_ids + rollout.response_ids)
        response_mask[row, start:end] = True
    return MicroBatch(tuple(rollouts), tokens.to(device), response_mask.to(device))


def idle(device: torch.device, annotations: Sequence[str] = ()) -> MicroBatch:
    """One token that nobody wrote, for a process that has nothing while others have something."""
    nothing = dict.fromkeys(annotations, (0.0,))
    return pad([Rollout(-1, (0,), (0,), author="nobody", annotations=nothing)], device)


def split_by_length(
    rollouts: Sequence[Rollout],
    micro_batch_tokens: int,
    device: torch.device,
    *,
    packed: bool = False,
) -> list[MicroBatch]:
    """Sort by length, longest first, and cut so that no micro-batch exceeds the budget.

    The length of a rollout is its reader's who reads more of it.

    What counts is what matmuls see: the real tokens where rows are ``packed``, else rows x longest.
    A single rollout longer than the budget gets a micro-batch of its own.
    """
    ordered = sorted(rollouts, key=lambda r: r.longest, reverse=True)
    batches: list[MicroBatch] = []
    group: list[Rollout] = []
    seen = 0
    for rollout in ordered:
        added = rollout.longest if packed or not group else group[0].longest
        if group and seen + added > micro_batch_tokens:
            batches.append(pad(group, device))
            group, seen, added = [], 0, rollout.longest
        group.append(rollout)
        seen += added
    return [*batches, pad(group, device)] if group else batches
