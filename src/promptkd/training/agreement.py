"""What all processes of a run must find alike, also on machines with files of their own."""

import os
import time
from pathlib import Path

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import UserError
from promptkd.ranks import Ranks
from promptkd.training.identity import Contents, differences, identity, other_contents
from promptkd.training.lock import NAME


def check_seen_alike(found: bool, directory: Path, ranks: Ranks) -> None:
    """All processes found something in the directory of rank 0, or none did.

    Raises:
        UserError: naming those that found otherwise than rank 0, on every process.
    """
    everybody = ranks.gather([(found, str(directory))])
    of_first, place = everybody[0]
    blind = [rank for rank, (own, _) in enumerate(everybody) if own is not of_first]
    if blind:
        raise UserError(
            f"Rank {', '.join(map(str, blind))} of {ranks.number} doesn't see {place} of rank 0, "
            "from which all processes read checkpoints: machines have directories of their own "
            "there, or were given different paths. Name one that they share, by its whole path."
        )


def check_shared(directory: Path, ranks: Ranks, patience: float) -> None:
    """All processes see the directory that rank 0 owns.

    Args:
        patience: seconds until they must. Networks remember for a while what wasn't there.

    Raises:
        UserError: naming those that don't, on every process.
    """
    lock = directory / NAME
    owner = ranks.gather([lock.read_text() if ranks.rank == 0 else ""])[0]
    end = time.monotonic() + patience
    while not (sees := _holds(lock, owner)) and time.monotonic() < end:
        time.sleep(0.5)
    check_seen_alike(sees, directory, ranks)


def check_alike(recipe: Recipe, method: Method, contents: Contents, ranks: Ranks) -> None:
    """All processes have one recipe, and read the same from data, models and checkpoints.

    Raises:
        UserError: naming the first that differs from rank 0 and what differs, on every process.
    """
    everybody = ranks.gather([(identity(recipe, method), contents)])
    asked, read = everybody[0]
    for rank, (own_asked, own_read) in enumerate(everybody):
        found = [*map(str, differences(asked, own_asked)), *other_contents(read, own_read)]
        if found:
            raise UserError(
                f"Rank {rank} of {ranks.number} doesn't have what rank 0 has ({', '.join(found)}): "
                "the machines' files, or the commands given there, differ. Make them the same."
            )


def _holds(path: Path, text: str) -> bool:
    try:
        for place in (path.parent.parent, path.parent):
            os.listdir(place)  # has NFS look again
        return path.read_text() == text
    except OSError:
        return False
