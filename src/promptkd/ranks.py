"""This process among those of a run: its share, and what all of them know together."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore
from torch.distributed.constants import default_pg_timeout

from promptkd.errors import UserError

ARRIVAL, LONGER = 60.0, 5.0
"""Seconds that a process waits for the others of its launch, and what more the one waits by whose
store the others know who is missing."""
OF_A_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell every process in its environment."""


def meet() -> PartialState:
    """Bring the processes of a launch together, on the CPU where there is no GPU.

    torch would wait half an hour for one that never comes, and name nobody then.

    Raises:
        UserError: naming those that didn't come in time.
    """
    on_cpu = not torch.cuda.is_available()
    is_launched = all(os.environ.get(name) for name in OF_A_LAUNCH)
    if is_launched and not torch.distributed.is_initialized():
        rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if number > 1:
            backend, store = "gloo" if on_cpu else "nccl", _store_of_all(rank, number)
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=number)
    return PartialState(cpu=on_cpu)


def _store_of_all(rank: int, number: int) -> TCPStore:
    """What processes talk by before they are a group, once all of them are there."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=ARRIVAL),
            wait_for_workers=False,
            multi_tenant=True,
        )
        missing = _missing(store, rank, number, seconds=ARRIVAL + LONGER * is_host)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"Port {port}, by which {number} processes were to meet, is taken on the machine "
                "of rank 0. Give all of them another one (MASTER_PORT)."
            ) from None
        raise _absent([0], rank, number) from None
    if missing:
        raise _absent(missing, rank, number)
    store.set_timeout(default_pg_timeout)
    return store


def _absent(missing: list[int], rank: int, number: int) -> UserError:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return UserError(
        f"Rank {', '.join(map(str, missing))} of {number} didn't come to {place} within "
        f"{ARRIVAL:.0f} s of rank {rank}. What it said itself tells why. If it said nothing, it "
        "wasn't started, or that name and port don't lead to the machine of rank 0. Then start "
        "all processes again."
    )


def _missing(store: TCPStore, rank: int, number: int, seconds: float) -> list[int]:
    """The ranks that haven't come after so many seconds; none as soon as all have."""
    keys, end = [f"here/{other}" for other in range(number)], time.monotonic() + seconds
    store.set(keys[rank], "")
    while not store.check(keys):
        if time.monotonic() > end:
            return [other for other, key in enumerate(keys) if not store.check([key])]
        time.sleep(0.2)
    return []


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
        state = meet()
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
