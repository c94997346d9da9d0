"""Who writes the responses a step learns from, and how they are cut into micro-batches.

A rollout is one request with one response. A source writes the rollouts of one optimizer step,
once. Sources are frozen; what they must remember lives in a ``state`` dictionary that belongs to
the trainer and is saved with every checkpoint.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from promptkd.data import Batch, EncodedExample

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """A request and the response somebody wrote, as token ids.

    ``response_ids`` has at least one token and ends with a stop token unless it was cut.
    ``annotations`` holds one number per response token (old log-probabilities, for instance).
    """

    index: int
    request_ids: Tokens
    response_ids: Tokens
    author: str
    annotations: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.request_ids) + len(self.response_ids)


Write = Callable[[Sequence[EncodedExample]], list[Rollout]]


@dataclass(frozen=True)
class Writers:
    """What a source may ask for during one optimizer step.

    Attributes:
        student: lets the current student write one response per request.
        teacher: the same for the plain teacher; its responses are kept and reused.
        mixed: tokens sampled from share x teacher + (1 - share) x student.
        progress: k / K, the fraction of training done before this step.
        seed: of the run.
        step: counted from 0.
    """

    student: Write
    teacher: Write
    mixed: Callable[[Sequence[EncodedExample], float], list[Rollout]]
    progress: float
    seed: int
    step: int

    def chance(self, what: str, share: float, index: int = 0) -> bool:
        """A coin that depends on seed, step and example alone, not on ranks or history."""
        return random.Random(f"{what} {self.seed} {self.step} {index}").random() < share


class Source(Protocol):
    """Who writes.

    Attributes:
        needs_references: whether every row must have a reference response.
        asks_teacher: whether the teacher writes (it then needs an engine).
    """

    @property
    def needs_references(self) -> bool: ...

    @property
    def asks_teacher(self) -> bool: ...

    def write(self, batch: Batch, writers: Writers, state: dict[str, Any]) -> list[Rollout]: ...

    def observe(self, validation_loss: float, state: dict[str, Any]) -> None:
        """Told after each evaluation: cross-entropy on references, nats per token."""
        ...


class Stateless:
    """A source that remembers nothing."""

    needs_references: ClassVar[bool] = False
    asks_teacher: ClassVar[bool] = False

    def observe(self, validation_loss: float, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Reference(Stateless):
    """The data's own responses."""

    needs_references: ClassVar[bool] = True

    def write(self, batch: Batch, writers: Writers, state: dict[str, Any]) -> list[Rollout]:
        return reference_rollouts(batch.examples)


@dataclass(frozen=True)
class Student(Stateless):
    """The current student: on-policy."""

    def write(self, batch: Batch, writers: Writers, state: dict[str, Any]) -> list[Rollout]:
        return writers.student(batch.examples)


@dataclass(frozen=True)
class Teacher(Stateless):
    """The plain teacher, off-line: each request is answered once and the answer is kept."""

    asks_teacher: ClassVar[bool] = True

    def write(self, batch: Batch, writers: Writers, state: dict[str, Any]) -> list[Rollout]:
        return writers.teacher(batch.examples)


@dataclass(frozen=True)
class Mixture(Stateless):
    """The student with probability ``student_share`` per request, else the data.

    The share goes linearly from ``student_share`` to ``final_share`` over training, if given.
    """

    student_share: float
    final_share: float | None = None

    needs_references: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for share in (self.student_share, self.final_share):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"student_share is {share}: a probability lies in [0, 1].")

    def share(self, progress: float) -> float:
        final = self.student_share if self.final_share is None else self.final_share
        return self.student_share + (final - self.student_share) * progress

    def write(self, batch: Batch, writers: Writers, state: dict[str, Any]) -> list[Rollout]:
        share = self.share(writers.progress)
        by_student = [e for e in batch.examples if writers.chance("mixture", share, e.index)]
        chosen = {example.index for example in by_student}
        by_data = [example for example in batch.examples if example.index not in chosen]
        return [
            *(writers.student(by_student) if by_student else []),
            *reference_rollouts(by_data),
        ]


def reference_rollouts(examples: Iterable[EncodedExample]) -> list[Rollout]:
    rollouts = []
    for example in examples:
        assert example.response_ids is not None, "refused when the recipe was read"
        rollouts.append(
            Rollout(example.index, example.request_ids, example.response_ids, "reference")
        )
    return rollouts


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts of similar length, right-padded into one rectangle."""

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


def pad(rollouts: Sequence[Rollout], device: torch.device, length: int = 0) -> MicroBatch:
    """Put rollouts side by side. Padding holds token 0: causality and masks hide it."""
    length = max(length, *(rollout.num_tokens for rollout in rollouts))
    tokens = torch.zeros(len(rollouts), length, dtype=torch.long)
    response_mask = torch.zeros(len(rollouts), length, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.request_ids), rollout.num_tokens
        tokens[row, :end] = torch.tensor(rollout.request_ids + rollout.response_ids)
        response_mask[row, start:end] = True
    return MicroBatch(tuple(rollouts), tokens.to(device), response_mask.to(device))


def split_by_length(rollouts: Sequence[Rollout], micro_batch_tokens: int,
                    device: torch.device) -> list[MicroBatch]:  # fmt: skip
    """Sort by length and cut where rows x longest would exceed the token budget.

    A single rollout longer than the budget gets a micro-batch of its own.
    """
    groups: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=lambda r: r.num_tokens, reverse=True):
        if groups and (len(groups[-1]) + 1) * groups[-1][0].num_tokens <= micro_batch_tokens:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return [pad(group, device) for group in groups]
