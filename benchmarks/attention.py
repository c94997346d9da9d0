"""Attention over whole sequences: torch's kernel and promptkd's grouped products.

SmolLM2-135M's heads (9 of queries on 3 of keys, width 64), bf16 if the CPU has it, and fp32
(where promptkd leaves it to torch); forward, and forward with backward; medians of nine. Writes
results/attention.*.json.
"""

import statistics
import time
from functools import partial
from typing import Any

import torch
from setting import DTYPES, record
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from promptkd.kernels.allocator import keep_freed_memory
from promptkd.kernels.attention import CausalAttention

SEQUENCES = ((16, 60), (8, 173), (4, 512), (2, 1024))
HEADS, SHARED, WIDTH = 9, 3, 64


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``CausalAttention`` with the arguments of torch's kernel."""
    rows, _, length, _ = query.shape
    flat = [given.transpose(1, 2).flatten(0, 1) for given in (query, key, value)]
    mixed: Any = CausalAttention.apply(*flat, rows * [length], WIDTH**-0.5)
    return mixed.view(rows, length, HEADS, WIDTH).transpose(1, 2)


def milliseconds(work) -> float:
    taken = []
    for _ in range(9):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def main() -> None:
    keep_freed_memory()  # as promptkd's commands do
    torch.manual_seed(0)
    seconds: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    for dtype in DTYPES:
        for rows, length in SEQUENCES:
            # Heads lie side by side in memory, as a projection writes them.
            shapes = [(rows, length, heads, WIDTH) for heads in (HEADS, SHARED, SHARED)]
            inputs = [
                torch.randn(*shape, dtype=dtype).transpose(1, 2).requires_grad_()
                for shape in shapes
            ]
            gradient = torch.randn(*shapes[0], dtype=dtype).transpose(1, 2)
            kernels = {
                "torch": partial(
                    scaled_dot_product_attention, *inputs, is_causal=True, enable_gqa=True
                ),
                "products": partial(products, *inputs),
            }

            def both(attend, inputs=inputs, gradient=gradient):
                torch.autograd.grad(attend(), inputs, gradient)

            with torch.no_grad():
                forward = {name: milliseconds(attend) for name, attend in kernels.items()}
            whole = {name: milliseconds(partial(both, attend)) for name, attend in kernels.items()}
            for what, taken in (("forward", forward), ("forward and backward", whole)):
                name = f"{str(dtype).removeprefix('torch.')}, {rows} x {length}, {what}"
                seconds[name] = {side: round(ms, 2) for side, ms in taken.items()}
                ratios[name] = round(taken["torch"] / taken["products"], 2)
    record("attention", {"milliseconds": seconds, "times_faster": ratios})


if __name__ == "__main__":
    main()
