"""GFLOP/s of a few tokens times a tall matrix: torch's ``linear`` and promptkd's, by blocks.

SmolLM2-135M's output layer and one of its MLP's matrices, fp32; 96 MB are written before each
product, so that no weight is in a cache, as when a whole model is read for every token. Medians of
nine. Writes results/products.json.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from setting import record

from promptkd.products import linear

TOKENS = (1, 8, 16, 64, 162)
SHAPES = {"head": (49152, 576), "up": (1536, 576)}  # shorter ones are not cut


def main() -> None:
    torch.manual_seed(0)
    elsewhere = torch.zeros(24_000_000)
    rates: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    for matrix, (rows, width) in SHAPES.items():
        weight = torch.randn(rows, width)
        for num_tokens in TOKENS:
            tokens = torch.randn(num_tokens, width)
            torch.testing.assert_close(linear(tokens, weight), F.linear(tokens, weight))
            seconds: dict[str, list[float]] = {"torch": [], "blocks": []}
            for _ in range(9):
                for name, product in (("torch", F.linear), ("blocks", linear)):
                    elsewhere.add_(1)
                    started = time.perf_counter()
                    product(tokens, weight)
                    seconds[name].append(time.perf_counter() - started)
            medians = {name: statistics.median(own) for name, own in seconds.items()}
            key = f"{matrix}, {num_tokens} tokens"
            flops = 2 * num_tokens * rows * width
            rates[key] = {name: round(flops / own / 1e9, 1) for name, own in medians.items()}
            ratios[key] = round(medians["torch"] / medians["blocks"], 2)
    record("products", {"gflops": rates, "times_faster": ratios}, precision="fp32")


if __name__ == "__main__":
    main()
