"""Which requests one optimizer step asks: a function of seed, step and rank alone. No torch."""

import math
import random
from dataclasses import dataclass
from functools import cache, partial

from promptkd.data.encoding import EncodedExample
from promptkd.data.sets import Dataset


@dataclass(frozen=True)
class Batch:
    """This rank's share of the requests of one optimizer step."""

    examples: tuple[EncodedExample, ...]

    def within(self, limit: int) -> "Batch":
        """The same requests; of their references, at most ``limit`` tokens each."""
        return Batch(tuple(map(partial(EncodedExample.within, limit=limit), self.examples)))


def batch_of_step(
    data: Dataset, step: int, global_batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1
) -> Batch:
    """The rank's share of the requests of ``step`` (counted from 0).

    A pure function of its arguments, so that a resumed run sees what the uninterrupted one saw:
    epochs are permutations seeded by (seed, epoch), read one after the other.
    """
    start = step * global_batch_size
    positions = range(start, start + global_batch_size)
    indices = [_permutation(len(data), seed, p // len(data))[p % len(data)] for p in positions]
    return Batch(tuple(data.examples[i] for i in indices[rank::num_ranks]))


def steps_of_epochs(epochs: float, num_examples: int, global_batch_size: int) -> int:
    return max(1, math.ceil(epochs * num_examples / global_batch_size))


@cache
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"data order {seed} {epoch}").shuffle(order)
    return tuple(order)
