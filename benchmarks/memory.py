"""Peak memory of a training step beyond weights, gradients and optimizer state, in bytes.

Each side takes two steps in a process of its own: the second one's peak resident memory, less what
the process held before it loaded anything, less both models' weights, the gradients and AdamW's
state. Writes results/memory.json.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from authors_order import AuthorsStep
from setting import OurStep, record, setting


def resident(kind: str) -> int:
    """VmRSS (now) or VmHWM (the most since ``forget_peak``), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {kind} in /proc/self/status")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def side(name: str) -> tuple[Callable[[int], object], int]:
    """One step as a function, and the bytes that it can't do without."""
    given = setting()
    teacher, student = (
        sum(p.numel() * p.element_size() for p in model.parameters())
        for model in (given.teacher, given.student)
    )
    needed = teacher + 4 * student  # weights, gradients, AdamW's two moments
    if name == "authors' order":
        return AuthorsStep(given), needed
    if name.startswith("trl"):
        from trl_step import trl_trainer

        plain = "no" in name
        trainer = trl_trainer(given, checkpointing=not plain, steps=1)
        return lambda number: trainer.train(), needed
    method, _, teacher_step = name.partition(", ")
    return OurStep(given, method, teacher_step or "before_student"), needed


def measure(name: str) -> None:
    before = resident("VmRSS")
    step, needed = side(name)
    step(0)
    forget_peak()
    step(1)
    print(json.dumps({"peak": resident("VmHWM") - before - needed, "needed": needed}))


def main() -> None:
    names = ["authors' order", "promptkd, before_student", "promptkd, with_student", "gkd"]
    if importlib.util.find_spec("trl"):
        names += ["trl", "trl, no gradient checkpointing"]
    rows = {}
    for name in names:
        result = subprocess.run(
            [sys.executable, __file__, name], check=True, capture_output=True, text=True
        )
        rows[name] = json.loads(result.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
    base = rows["authors' order"]["peak"]
    shares = {name: round(row["peak"] / base, 3) for name, row in rows.items()}
    record("memory", {"bytes": rows, "against_authors_order": shares})


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
