"""Requests that training and held-out data share, and a split that keeps them apart."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.data.examples import Example, request_text
from promptkd.errors import UserError

SHINGLE = 5
"""Characters of a shingle: short enough for scripts without spaces."""


@dataclass(frozen=True)
class Overlap:
    """Held-out requests that the training data has as well.

    Attributes:
        exact: positions of those that are equal but for white space.
        near: positions of those that are nearly equal to a training request, but not equal.
    """

    exact: tuple[int, ...]
    near: tuple[int, ...]
    num_held_out: int

    def sentence(self) -> str | None:
        """What was found, or None."""
        counts = ((len(self.exact), "are in"), (len(self.near), "are nearly equal to one in"))
        found = [f"{count} {words}" for count, words in counts if count]
        if not found:
            return None
        return f"of {self.num_held_out} held-out requests {' and '.join(found)} the training data"


def overlap(
    train: Sequence[Example], held_out: Sequence[Example], similarity: float = 0.8
) -> Overlap:
    """Which held-out requests are in the training data, exactly or nearly.

    Two requests are nearly equal if their sets of shingles have a Jaccard index of at least
    ``similarity``. Only requests that share enough of the rarest shingles of a held-out one are
    compared; no others can be that similar, so the result is that of comparing all pairs.
    """
    ours, theirs = [_normal(e) for e in train], [_normal(e) for e in held_out]
    known = set(ours)
    exact = tuple(i for i, text in enumerate(theirs) if text in known)
    rest = [i for i, text in enumerate(theirs) if text not in known]
    sets = {i: _shingles(theirs[i]) for i in rest}
    counts: Counter[str] = Counter(dict.fromkeys(set().union(*sets.values()), 0))
    for text in known:  # shingles are made twice, which is quicker than to keep them
        counts.update(_shingles(text) & counts.keys())
    index: dict[str, list[int]] = defaultdict(list)
    for i, own in sets.items():
        for shingle in _rarest(own, counts, similarity):
            index[shingle].append(i)
    near: set[int] = set()
    for text in known:
        own = _shingles(text)
        shared = Counter(i for shingle in own & index.keys() for i in index[shingle])
        likely = (i for i, count in shared.items() if count > _missing(sets[i], similarity))
        near.update(i for i in likely if _jaccard(own, sets[i]) >= similarity)
    return Overlap(exact, near=tuple(sorted(near)), num_held_out=len(held_out))


def split_by_digest(
    examples: Sequence[Example], held_out: float
) -> tuple[list[Example], list[Example]]:
    """Split rows into training and held-out ones, by the digest of each request.

    The same request is never on both sides, and rows that are added later don't move the others
    (given a share; a number keeps the requests of the smallest digests).

    Args:
        held_out: a share below 1, or a number of rows (more where the last request has several).

    Raises:
        UserError: if one side would be empty.
    """
    digests = [_fraction(example) for example in examples]
    limit = float(held_out)
    if held_out >= 1:
        limit = math.nextafter(sorted(digests)[: int(held_out)][-1], 1) if digests else 0.0
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example, digest in zip(examples, digests, strict=True):
        sides[digest < limit].append(example)
    if not all(sides):
        raise UserError(
            f"Holding out {held_out:g} of {len(examples)} rows leaves {len(sides[0])} for training "
            f"and {len(sides[1])} held out. Give another number, or more rows."
        )
    return sides


def _normal(example: Example) -> str:
    return " ".join(request_text(example).split())


def _fraction(example: Example) -> float:
    digest = hashlib.sha256(_normal(example).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _shingles(text: str) -> set[str]:
    text = text.casefold()
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def _missing(own: set[str], similarity: float) -> int:
    """How many shingles of a set may be missing from another one that is as similar."""
    return len(own) - math.ceil(similarity * len(own) - 1e-9)


def _rarest(own: set[str], counts: Counter[str], similarity: float) -> list[str]:
    """So many of a set's rarest shingles that a similar set has more than may be missing."""
    number = 2 * _missing(own, similarity) + 1
    return sorted(own, key=lambda shingle: (counts[shingle], shingle))[:number]


def _jaccard(own: set[str], other: set[str]) -> float:
    shared = len(own & other)
    return shared / (len(own) + len(other) - shared)
