"""Peak memory of the loss at 4,096 response tokens x 49,152 entries, against whole fp32 logits.

The student's loss and the adaptation's KL towards it, gradients to both models included: what a
step of PromptKD does in `with_student` mode. In fp32, and in bf16 where the CPU multiplies it
(fp32 master weights for the student). Bytes and seconds, each precision in a process of its own;
writes results/loss_memory.*.json.

    python benchmarks/loss_memory.py [fp32|bf16 [ENTRIES_PER_CHUNK ENTRIES_PER_TILE]]

With arguments it only prints.
"""

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict

import torch

from promptkd.divergences import reverse_kl
from promptkd.models.language_model import Head
from promptkd.models.loading import compute_dtype, native_bf16
from promptkd.objectives import TILINGS, States, Tiling, accumulate

TOKENS, ENTRIES, WIDTH = 4096, 49152, 576
CPU = torch.device("cpu")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(precision: str, tiling: Tiling) -> None:
    torch.manual_seed(0)
    dtype = compute_dtype(precision, CPU)
    states = {}
    for name in ("student", "teacher"):
        learns = name == "student"
        matrix = torch.randn(ENTRIES, WIDTH) / 8  # logits of standard deviation 3
        weight = torch.nn.Parameter(matrix if learns else matrix.to(dtype), requires_grad=learns)
        weight.grad = torch.zeros_like(weight) if learns else None
        hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
        states[name] = States(hidden * 1.0, Head(weight, None, ENTRIES, dtype=dtype), learns=True)
    before = peak()

    def losses(logprobs, piece):
        student, teacher = logprobs["student"], logprobs["teacher"]
        return {
            "student": reverse_kl(student, teacher.detach()),
            "towards_student": reverse_kl(teacher, student.detach()),
        }

    weights = {"student": 1 / TOKENS, "towards_student": 1 / TOKENS}
    started = time.perf_counter()
    accumulate(states, losses, weights, tiling)
    seconds = time.perf_counter() - started
    extra, whole = peak() - before, 2 * TOKENS * ENTRIES * 4
    row = {**asdict(tiling), "extra": extra, "whole_logits": whole}
    row |= {"against_whole_logits": round(extra / whole, 3), "seconds": round(seconds, 1)}
    print(json.dumps(row))


def main() -> None:
    from setting import record  # only here: what it imports would count where it is measured

    rows = {}
    for precision in ["fp32", *(["bf16"] if native_bf16(CPU) else [])]:
        command = [sys.executable, __file__, precision]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[precision] = json.loads(result.stdout.splitlines()[-1])
    record("loss_memory", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], Tiling(*map(int, sys.argv[2:])) if sys.argv[2:] else TILINGS["cpu"])
    else:
        main()
