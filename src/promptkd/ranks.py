"""This process among those of a run: its share, and what all of them know together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor


def leave() -> None:
    """End the talk of the processes; torn down by the exit instead, its threads may abort one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """One of ``number`` processes, counted from 0; a single process needs nobody."""

    rank: int = 0
    number: int = 1

    @classmethod
    def of_launch(cls) -> "Ranks":
        """Those that torchrun or accelerate started; they are brought together."""
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.number > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The same for a few numbers, in float64."""
        return self.sum(torch.tensor(values, dtype=torch.float64).to(device)).tolist()

    def gather(self, items: list[Any]) -> list[Any]:
        """Everybody's items, rank after rank."""
        return gather_object(items) if self.number > 1 else items

    def share(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """Every ``number``-th item, from this process's own."""
        return items[self.rank :: self.number]


ALONE = Ranks()
