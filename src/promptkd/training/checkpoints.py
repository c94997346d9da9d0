"""Checkpoints: written beside, checked, then renamed, so that the latest good one always loads."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from promptkd.errors import UserError
from promptkd.files import whole_directory, write_json


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


def save_checkpoint(
    directory: Path, checkpoint: Checkpoint, keep: int, spared: int | None = None
) -> Path:
    """Write ``directory/step-NNNNNN`` and remove the oldest beyond ``keep``.

    Args:
        directory: of all checkpoints.
        checkpoint: the newest.
        keep: how many stay.
        spared: a step whose checkpoint stays however old it is.

    Raises:
        UserError: if the disk is full; what was there before is untouched.
    """
    final = _place(directory, checkpoint.step)
    with whole_directory(final, f"checkpoint of step {checkpoint.step}") as temporary:
        for name, state in checkpoint.tensors.items():
            with open(temporary / f"{name}.pt", "wb") as file:
                torch.save(state, file)
        write_json(temporary / "progress.json", checkpoint.progress)
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", digests)
    for old in saved_checkpoints(directory)[:-keep]:
        if step_of(old) != spared:
            shutil.rmtree(old)
    return final


def saved_checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("step-[0-9]*"), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def remove_after(directory: Path, step: int) -> None:
    for path in saved_checkpoints(directory):
        if step_of(path) > step:
            shutil.rmtree(path)


def load_latest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are all as written, and a sentence per damaged one."""
    complaints = []
    for path in reversed(saved_checkpoints(directory)):
        damage = _damage(path)
        if damage is None:
            return _read(path), complaints
        complaints.append(f"Checkpoint {path} is damaged ({damage}); using the one before.")
    return None, complaints


def load_step(directory: Path, step: int) -> Checkpoint | None:
    """The checkpoint of one step; None for step 0, the start, which has none.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    if step == 0:
        return None
    path = _place(directory, step)
    damage = _damage(path) if path.is_dir() else "it doesn't exist"
    if damage is not None:
        steps = [0, *map(step_of, saved_checkpoints(directory))]
        raise UserError(
            f"The checkpoint of step {step} can't be used: {damage}. There are those of the steps "
            f"{', '.join(map(str, steps))} (0 is the start)."
        )
    return _read(path)


def _read(path: Path) -> Checkpoint:
    tensors = {
        file.stem: torch.load(file, map_location="cpu", weights_only=True)
        for file in path.glob("*.pt")
    }
    return Checkpoint(step_of(path), tensors, json.loads((path / "progress.json").read_text()))


def _place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


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
