"""Checkpoints: written beside, checked, then renamed, so that the latest good one always loads."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from promptkd.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimizer steps.

    Attributes:
        tensors: torch state by name; one file each.
        progress: everything else, as JSON.
    """

    step: int
    tensors: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``directory/step-NNNNNN`` and remove the oldest beyond ``keep``.

    Raises:
        UserError: if the disk is full; what was there before is untouched.
    """
    final = directory / f"step-{checkpoint.step:06d}"
    with writing(final, f"checkpoint of step {checkpoint.step}") as temporary:
        for name, state in checkpoint.tensors.items():
            with open(temporary / f"{name}.pt", "wb") as file:
                torch.save(state, file)
        (temporary / "progress.json").write_text(json.dumps(checkpoint.progress))
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(digests, indent=1))
    for old in saved_checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def saved_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("step-[0-9]*"), key=_step)


def load_latest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as written, and a sentence per damaged one."""
    complaints = []
    for path in reversed(saved_checkpoints(directory)):
        damage = _damage(path)
        if damage is None:
            tensors = {
                file.stem: torch.load(file, map_location="cpu", weights_only=True)
                for file in path.glob("*.pt")
            }
            progress = json.loads((path / "progress.json").read_text())
            return Checkpoint(_step(path), tensors, progress), complaints
        complaints.append(f"Checkpoint {path} is damaged ({damage}); using the one before.")
    return None, complaints


@contextmanager
def writing(final: Path, what: str) -> Iterator[Path]:
    """A temporary directory that takes the name ``final`` when all was written, replacing it.

    Raises:
        UserError: if there is no space; the temporary directory is removed, ``final`` is kept.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".writing-{final.name}"
    old = final.parent / f".replaced-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if out_of_space(error):
            free = shutil.disk_usage(final.parent).free / 1e6
            raise UserError(
                f"No space left while writing the {what} ({free:.0f} MB free in {final.parent}). "
                "What was saved before is intact: free some space and run the same command again."
            ) from None
        raise


def recover_replaced(final: Path) -> None:
    """Finish a replacement that was interrupted between its two renames."""
    old = final.parent / f".replaced-{final.name}"
    if old.exists() and not final.exists():
        old.rename(final)


def out_of_space(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    # torch's and safetensors' writers report the system's words in an error of their own
    words = ("No space left", "Disk quota", "File too large", "PytorchStreamWriter")
    return any(word in str(error) for word in words)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _damage(path: Path) -> str | None:
    try:
        digests = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        digests = None
    if not isinstance(digests, dict) or "progress.json" not in digests:
        return "its manifest.json is missing or broken"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} is not as it was written"
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
