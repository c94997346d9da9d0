"""What a run records of its steps: metrics.jsonl, samples.jsonl, trackers, its environment."""

import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers

from promptkd.errors import UserError
from promptkd.files import append_json_lines, read_json_lines, write_json_lines
from promptkd.ranks import Ranks
from promptkd.rollouts import Rollout
from promptkd.training.step import StepMetrics


class JsonLines:
    """An append-only file of JSON objects, cut back to the checkpoint when a run goes on."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> list[str]:
        """Forget everything after ``step`` and a last line that was not finished.

        Returns:
            A sentence if lines are damaged that no interruption can have damaged.
        """
        if not self.path.exists():
            return []
        rows, damaged = self._lines()
        kept = [row for row in rows.values() if row["step"] <= step]
        write_json_lines(self.path, kept)
        inside = [str(line) for line in damaged if line < max(rows, default=0)]
        if not inside:
            return []
        return [f"{self.path} is damaged in line {', '.join(inside)}: left out; the rest is kept."]

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        append_json_lines(self.path, rows)

    def read(self) -> list[dict[str, Any]]:
        return list(self._lines()[0].values()) if self.path.exists() else []

    def _lines(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """By number: those about a step, and those that are damaged or about none."""
        rows, damaged = read_json_lines(self.path)
        other = [line for line, row in rows.items() if not isinstance(row.get("step"), int)]
        kept = {line: row for line, row in rows.items() if line not in other}
        return kept, sorted([*damaged, *other])


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that aren't installed.

    Raises:
        UserError: naming them.
    """
    missing = set(names) - {str(tracker) for tracker in get_available_trackers()}
    if missing:
        raise UserError(
            f"tracking asks for {', '.join(sorted(missing))}, which is not installed. "
            f"Run: pip install {' '.join(sorted(missing))}"
        )


def describe_step(
    step: int,
    rollouts: Sequence[Sequence[Rollout]],
    metrics: StepMetrics,
    stop: Sequence[int],
    ranks: Ranks,
) -> dict[str, Any]:
    """A step's line of metrics.jsonl; means are over all response tokens of all ranks.

    Lengths and endings are those of the student's own responses where it wrote any: references
    among them would hide that the student stops ending.
    """
    flat = [rollout for written in rollouts for rollout in written]
    own = [rollout for rollout in flat if rollout.author == "student"]
    counts = [_counted(flat, stop), _counted(own, stop)]
    num_empty = sum(not set(r.response_ids) - set(stop) for r in own)
    device = metrics.cost.device
    *sums, num_empty = ranks.sums([*counts[0], *counts[1], num_empty], device)
    (num_responses, num_tokens, _), (num_own, *_) = of_all, of_own = sums[:3], sums[3:]
    described, length, ended = of_own if num_own else of_all
    row: dict[str, Any] = {
        "step": step + 1,
        "loss": metrics.loss,
        "response_length": length / described,
        "share_ended": ended / described,
        "num_empty": int(num_empty),
        "student_share": num_own / num_responses,
        "num_responses": int(num_responses),
        "num_tokens": int(num_tokens),
        "padding_share": metrics.padding_share,
    }
    if "towards_student" in metrics.nats:
        row["kl_teacher_student"] = metrics.teacher_mean("towards_student")
    if "towards_itself" in metrics.nats:
        row["kl_teacher_plain"] = metrics.teacher_mean("towards_itself")
    row |= {f"gradient_norm_{who}": norm for who, norm in metrics.gradient_norms.items()}
    row |= {f"seconds_{phase}": took for phase, took in metrics.cost.seconds.items()}
    row["flops"] = sum(metrics.cost.flops.values())
    row["peak_memory"] = peak_memory(device)
    return row


def _counted(rollouts: Sequence[Rollout], stop: Sequence[int]) -> list[int]:
    """Responses, their tokens, and how many of them ended by themselves."""
    ended = sum(rollout.response_ids[-1] in stop for rollout in rollouts)
    return [len(rollouts), sum(len(rollout.response_ids) for rollout in rollouts), ended]


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: of the GPU's memory if it works on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment() -> dict[str, Any]:
    """Versions, hardware and commit: what a number needs to be rerun."""
    packages = ("promptkd", "torch", "transformers", "accelerate", "peft", "numpy")
    return {
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _cpu() -> str:
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
