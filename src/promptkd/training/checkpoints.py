"""Checkpoints: written beside, checked, then renamed, so that the latest good one always loads."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``directory/step-NNNNNN`` and remove the oldest beyond ``keep``.

    Raises:
        UserError: if the disk is full; what was there before is untouched.
    """
    final = directory / f"step-{checkpoint.step:06d}"
    with whole_directory(final, f"checkpoint of step {checkpoint.step}") as temporary:
        for name, state in checkpoint.tensors.items():
            with open(temporary / f"{name}.pt", "wb") as file:
                torch.save(state, file)
        write_json(temporary / "progress.json", checkpoint.progress)
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", digests)
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
