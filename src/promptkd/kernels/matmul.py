"""Faster CPU matmuls for a handful of tokens: whole bf16 steps 1.1 times as fast.

And the output layer's gradient, in the way of each device (``add_outer``).

Generation alone takes 12 % (bf16) to 27 % (fp32) less time (benchmarks/kernel_gains.py for steps).
Every generated token reads every weight, and torch's ``linear`` reaches a quarter of the memory's
speed. One with weights laid out anew takes half to nine tenths of the time; where they
can't be, because they are about to learn, fp32 gains nearly as much by a product cut into blocks of
rows, which are multiplied side by side (benchmarks/products.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BLOCK = 64
"""Rows of a block; a divisor of nearly every model's widths."""
FEWEST_BLOCKS = 16
"""A matrix of fewer rows gains nothing, or loses (benchmarks/products.py)."""
FEW_TOKENS = 16
"""What oneDNN lays weights out for; more tokens are as fast as with ``linear``, or faster."""
SLICE = 4096
"""Rows of a gradient that a processor multiplies and adds while they are in its cache."""


def linear(
    tokens: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, "rows width"],
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*tokens rows"]:
    """``torch.nn.functional.linear``; by blocks where that is faster (fp32 on a CPU)."""
    num_blocks = len(weight) // BLOCK
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or num_blocks < FEWEST_BLOCKS:
        return F.linear(tokens, weight, bias)
    flat = tokens.reshape(-1, tokens.shape[-1])
    blocks = weight[: num_blocks * BLOCK].unflatten(0, (num_blocks, BLOCK))
    products = torch.bmm(flat.expand(num_blocks, -1, -1), blocks.mT)
    result = products.transpose(0, 1).flatten(1)
    rest = weight[num_blocks * BLOCK :]
    if len(rest):
        result = torch.cat([result, flat @ rest.T], dim=1)
    if bias is not None:
        result += bias
    return result.view(*tokens.shape[:-1], len(weight))


@torch.no_grad()
def add_outer(
    into: Float[Tensor, "rows width"],
    gradient: Float[Tensor, "tokens rows"],
    states: Float[Tensor, "tokens width"],
) -> None:
    """Add gradient^T states to ``into`` in place: the gradient of a weight, for some tokens.

    Where ``into`` is in fp32 and the factors aren't (master weights), sums are fp32's: on NVIDIA's
    cards in one product, whose result is never written beside ``into``; else slice by slice, of
    products that are rounded once.
    """
    if into.dtype == states.dtype:
        into.addmm_(gradient.T, states)
    elif _sums_in_fp32(into):
        torch.addmm(into, gradient.T, states, out_dtype=torch.float32, out=into)
    else:
        for rows, part in zip(into.split(SLICE), gradient.T.split(SLICE), strict=True):
            rows += part @ states


def _sums_in_fp32(into: Tensor) -> bool:
    """Whether there is a product of bf16 or fp16 that is summed in an fp32 matrix: CUDA's alone."""
    return into.is_cuda and into.dtype == torch.float32 and torch.version.hip is None


class GenerationMatmuls:
    """Products while text is written: weights don't change, and nothing learns.

    A weight is laid out for oneDNN when it is first used, by the operators that torch's own
    compiler uses; the copy lives as long as this object does.
    """

    def __init__(self):
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def within(self, *modules: nn.Module) -> Iterator[None]:
        """Linear layers of the modules multiply so until the end."""
        layers = [
            layer for module in modules for layer in module.modules() if type(layer) is nn.Linear
        ]
        for layer in layers:
            layer.forward = partial(self._forward, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _forward(self, layer: nn.Linear, input: Tensor) -> Tensor:
        return self.linear(input, layer.weight, layer.bias)

    def linear(self, tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See the module's ``linear``."""
        known = weight.dtype == tokens.dtype and weight.dtype in _laid_out()
        if weight.device.type != "cpu" or not known:
            return linear(tokens, weight, bias)
        if id(weight) not in self._packed:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW_TOKENS)
            self._packed[id(weight)] = weight, packed  # alive, or its id could be another's
        packed = self._packed[id(weight)][1]
        return torch.ops.mkldnn._linear_pointwise(tokens, packed, bias, "none", [], "")


@cache
def _laid_out() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    in_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if in_bf16 else (torch.float32,)
