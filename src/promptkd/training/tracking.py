"""What a run writes down while it goes: metrics.jsonl, samples.jsonl, trackers, progress."""

import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from promptkd.files import append_json_lines, read_json_lines, write_json_lines


class JsonLines:
    """An append-only file of JSON objects, cut back to the checkpoint when a run goes on."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Forget everything after ``step`` and a last line that was not finished."""
        if not self.path.exists():
            return
        write_json_lines(self.path, [row for row in self.read() if row["step"] <= step])

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        append_json_lines(self.path, rows)

    def read(self) -> list[dict[str, Any]]:
        return read_json_lines(self.path)[0]


def environment() -> dict[str, Any]:
    """Versions, hardware and commit: what a number needs to be rerun."""
    packages = ("promptkd", "torch", "transformers", "accelerate", "peft", "numpy")
    return {
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit of the working directory's repository, with + if it was changed."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
