"""Peak memory of a training step beyond weights, gradients and optimizer state, in bytes.

Each side takes two steps in a process of its own: the second one's peak resident memory, less what
the process held before it loaded anything, less both models' weights, the gradients and AdamW's
state. promptkd also with other budgets (micro_batch_tokens) and more requests, and its writing
alone. Writes results/memory.*.json.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from authors_order import AuthorsStep
from setting import OurStep, Setting, record, setting

BUDGETS = [(8, 512), (8, 1024), (8, 2048), (16, 1024), (32, 1024)]
"""Requests, tokens of a micro-batch."""


def resident(kind: str) -> int:
    """VmRSS (now) or VmHWM (the most since ``forget_peak``), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {kind} in /proc/self/status")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def side(name: str, given: Setting, micro_batch_tokens: int) -> Callable[[int], object]:
    if name == "authors' order":
        return AuthorsStep(given)
    if name.startswith("trl"):
        from trl_step import trl_trainer

        trainer = trl_trainer(given, checkpointing=name == "trl", steps=1)
        return lambda number: trainer.train()
    if name == "writing":
        return OurStep(given, "gkd").write
    method, _, teacher_step = name.partition(", ")
    teacher_step = teacher_step or "before_student"
    return OurStep(given, method, teacher_step, micro_batch_tokens=micro_batch_tokens)


def measure(name: str, num_requests: int, micro_batch_tokens: int) -> None:
    before = resident("VmRSS")
    given = setting(num_requests)
    teacher, student = (
        sum(p.numel() * p.element_size() for p in model.parameters())
        for model in (given.teacher, given.student)
    )
    # Weights, gradients, AdamW's two moments.
    needed = teacher + (student if name == "writing" else 4 * student)
    step = side(name, given, micro_batch_tokens)
    step(0)
    forget_peak()
    step(1)
    print(json.dumps({"peak": resident("VmHWM") - before - needed, "needed": needed}))


def in_a_process(name: str, num_requests: int = 8, micro_batch_tokens: int = 4096) -> dict:
    command = [sys.executable, __file__, name, str(num_requests), str(micro_batch_tokens)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    row = json.loads(result.stdout.splitlines()[-1])
    print(name, num_requests, micro_batch_tokens, row, flush=True)
    return row


def main() -> None:
    names = ["authors' order", "promptkd, before_student", "promptkd, with_student", "gkd"]
    if importlib.util.find_spec("trl"):
        names += ["trl", "trl, no gradient checkpointing"]
    rows = {name: in_a_process(name) for name in [*names, "writing"]}
    rows |= {
        f"promptkd, {n} requests, {budget} tokens at a time": in_a_process("promptkd", n, budget)
        for n, budget in BUDGETS
    }
    compared = {"against_authors_order": "authors' order", "against_trl": "trl"}
    shares = {
        what: {name: round(row["peak"] / rows[base]["peak"], 3) for name, row in rows.items()}
        for what, base in compared.items()
        if base in rows
    }
    record("memory", {"bytes": rows, **shares})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
