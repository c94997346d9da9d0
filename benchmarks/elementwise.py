"""A norm and a gated activation: transformers' code under autograd, and promptkd's.

SmolLM2-135M's widths, 1,448 tokens, bf16 and fp32; forward, forward with backward, and what is kept
for the backward pass beside the inputs; medians of 31, the sides alternating. Writes
results/elementwise.*.json.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from setting import record
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from promptkd.kernels.allocator import keep_freed_memory
from promptkd.kernels.norms_and_gates import RMSNorm, SwiGLU

TOKENS, WIDTH, GATES = 1448, 576, 1536
EPSILON = 1e-5


def median_milliseconds(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(31):
        for name, work in sides.items():
            started = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - started)
    return {name: round(1000 * statistics.median(own), 3) for name, own in taken.items()}


def bytes_kept(work: Callable[[], object], inputs: list[Tensor]) -> int:
    """Of every storage that the backward pass needs and that isn't an input's."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, or reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()
    for given in inputs:
        kept.pop(given.untyped_storage().data_ptr(), None)
    del result
    return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    keep_freed_memory()  # as promptkd's commands do
    torch.manual_seed(0)
    milliseconds: dict[str, dict[str, float]] = {}
    kept: dict[str, dict[str, int]] = {}
    ratios: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        hidden, gate, up = (
            torch.randn(TOKENS, width, dtype=dtype).requires_grad_()
            for width in (WIDTH, GATES, GATES)
        )
        norm = LlamaRMSNorm(WIDTH, EPSILON).to(dtype)
        pieces = {
            "norm": (
                [hidden, norm.weight],
                {
                    "transformers": partial(norm, hidden),
                    "promptkd": partial(RMSNorm.apply, hidden, norm.weight, EPSILON),
                },
            ),
            "gated activation": (
                [gate, up],
                {
                    "transformers": lambda gate=gate, up=up: F.silu(gate) * up,
                    "promptkd": partial(SwiGLU.apply, gate, up),
                },
            ),
        }
        for piece, (inputs, sides) in pieces.items():
            gradient = torch.randn_like(inputs[0])

            def both(work, inputs=inputs, gradient=gradient):
                return torch.autograd.grad(work(), inputs, gradient)

            name = f"{str(dtype).removeprefix('torch.')}, {piece}"
            kept[name] = {side: bytes_kept(work, inputs) for side, work in sides.items()}
            with torch.no_grad():
                forward = median_milliseconds(sides)
            whole = median_milliseconds({side: partial(both, work) for side, work in sides.items()})
            for what, taken in (("forward", forward), ("forward and backward", whole)):
                milliseconds[f"{name}, {what}"] = taken
                ratios[f"{name}, {what}"] = round(taken["transformers"] / taken["promptkd"], 2)
    row = {"milliseconds": milliseconds, "times_faster": ratios, "bytes_kept": kept}
    record("elementwise", row)


if __name__ == "__main__":
    main()
