"""Peak memory of the loss at 4,096 response tokens x 49,152 entries, against whole fp32 logits.

The student's loss and the adaptation's KL towards it, gradients to both models included: what a
step of PromptKD does in `with_student` mode. Bytes and seconds; writes results/loss_memory.json.
Two arguments set the entries per chunk and per tile; then it only prints.
"""

import json
import resource
import sys
import time
from dataclasses import asdict

import torch

from promptkd.divergences import reverse_kl
from promptkd.models import Head
from promptkd.objectives import TILINGS, States, Tiling, accumulate

TOKENS, ENTRIES, WIDTH = 4096, 49152, 576


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    torch.manual_seed(0)
    states = {}
    for name in ("student", "teacher"):
        matrix = torch.randn(ENTRIES, WIDTH) / 8  # logits of standard deviation 3
        weight = torch.nn.Parameter(matrix, requires_grad=name == "student")
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
        states[name] = States(hidden * 1.0, Head(weight, None, ENTRIES), learns=True)
    before = peak()

    def losses(logprobs, piece):
        student, teacher = logprobs["student"], logprobs["teacher"]
        return {
            "student": reverse_kl(student, teacher.detach()),
            "towards_student": reverse_kl(teacher, student.detach()),
        }

    tiling = Tiling(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else TILINGS["cpu"]
    weights = {"student": 1 / TOKENS, "towards_student": 1 / TOKENS}
    started = time.perf_counter()
    accumulate(states, losses, weights, tiling)
    seconds = time.perf_counter() - started
    extra, whole = peak() - before, 2 * TOKENS * ENTRIES * 4
    row = {**asdict(tiling), "extra": extra, "whole_logits": whole}
    row |= {"against_whole_logits": round(extra / whole, 3), "seconds": round(seconds, 1)}
    if len(sys.argv) > 1:
        print(json.dumps(row))
    else:
        from setting import record  # only now: what it imports would count

        record("loss_memory", row)


if __name__ == "__main__":
    main()
