"""GFLOP/s of a few tokens times a tall matrix: torch's ``linear`` and promptkd's.

SmolLM2-135M's output layer and one of its MLP's matrices. A weight is laid out anew, once before a
text is written, which is not timed here. 96 MB are written before each product, so that no weight
is in a cache, as when a whole model is read for every token. Medians of nine. Writes
results/products.*.json.
"""

import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from setting import DTYPES, record

from promptkd.kernels.matmul import GenerationMatmuls

TOKENS = (1, 8, 16, 64, 162)
SHAPES = {"head": (49152, 576), "up": (1536, 576)}


def main() -> None:
    torch.manual_seed(0)
    elsewhere = torch.zeros(24_000_000)
    rates: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    cases = itertools.product(DTYPES, SHAPES.items(), TOKENS)
    for dtype, (matrix, (rows, width)), num_tokens in cases:
        weight = torch.randn(rows, width, dtype=dtype)
        tokens = torch.randn(num_tokens, width, dtype=dtype)
        ours = GenerationMatmuls().linear
        seconds: dict[str, list[float]] = {"torch": [], "promptkd": []}
        for _ in range(9):
            for name, product in (("torch", F.linear), ("promptkd", ours)):
                elsewhere.add_(1)
                started = time.perf_counter()
                product(tokens, weight)
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(own) for name, own in seconds.items()}
        key = f"{str(dtype).removeprefix('torch.')}, {matrix}, {num_tokens} tokens"
        flops = 2 * num_tokens * rows * width
        rates[key] = {name: round(flops / own / 1e9, 1) for name, own in medians.items()}
        ratios[key] = round(medians["torch"] / medians["promptkd"], 2)
    record("products", {"gflops": rates, "times_faster": ratios})


if __name__ == "__main__":
    main()
