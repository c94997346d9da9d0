"""Peak memory of the loss at 4,096 response tokens x 49,152 entries, against whole fp32 logits.

The student's loss and the adaptation's KL towards it, gradients to both models included: what a
step of PromptKD does in `with_student` mode. Prints one JSON line, in bytes and seconds.
An argument sets the entries per chunk.
"""

import json
import resource
import sys
import time

import torch

from promptkd.divergences import reverse_kl
from promptkd.models import Head
from promptkd.objectives import CHUNK_ENTRIES, States, accumulate

TOKENS, ENTRIES, WIDTH = 4096, 49152, 576


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    torch.manual_seed(0)
    states = {}
    for name in ("student", "teacher"):
        weight = torch.nn.Parameter(torch.randn(ENTRIES, WIDTH), requires_grad=name == "student")
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

    chunk = int(sys.argv[1]) if len(sys.argv) > 1 else CHUNK_ENTRIES
    weights = {"student": 1 / TOKENS, "towards_student": 1 / TOKENS}
    started = time.perf_counter()
    accumulate(states, losses, weights, chunk)
    seconds = time.perf_counter() - started
    extra, whole = peak() - before, 2 * TOKENS * ENTRIES * 4
    row = {"benchmark": "loss_memory", "chunk_entries": chunk, "extra": extra}
    row |= {"whole_logits": whole, "share": round(extra / whole, 3), "seconds": round(seconds, 1)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
