"""One process at a time owns a run."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from promptkd.errors import UserError

NAME = ".lock"
"""In the run's directory while somebody trains there; holds their host and pid."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Own ``directory``, made if need be; the system frees what a dead process held.

    Raises:
        UserError: if another process owns it, by host and pid.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _hold(descriptor):
            os.close(descriptor)
            refuse_if_held(directory)
        elif _is_still(path, descriptor):
            break
        else:
            os.close(descriptor)  # its owner removed it between the two calls
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def refuse_if_held(directory: Path) -> None:
    """Say at once what ``locked`` would say after the models were loaded.

    Raises:
        UserError: if another process owns ``directory``.
    """
    try:
        descriptor = os.open(directory / NAME, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return
    held = not _hold(descriptor)
    owner = os.read(descriptor, 1000).decode(errors="replace")
    os.close(descriptor)
    if held:
        raise UserError(
            f"{directory} is being trained by {owner or 'another process'}. Wait until it ends, "
            "stop it, or choose another output."
        )


def _hold(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
