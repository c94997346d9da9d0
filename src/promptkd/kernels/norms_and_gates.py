"""RMSNorm and SwiGLU that save only their inputs: a step keeps a fifth less memory.

Autograd keeps an operand of every element-wise operation and makes a tensor for each result. Here
a norm keeps its input (the residual stream, which is there anyway) and a number per token, a gated
MLP its two factors (benchmarks/elementwise.py). The norm is also 1.4 to 1.6 times as fast; a whole
step takes the same time (benchmarks/kernel_gains.py). Forward passes are equal bit for bit.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

silu_backward = torch.ops.aten.silu_backward.grad_input


def save_only_inputs(model: PreTrainedModel) -> None:
    """Let norms and gated MLPs that compute what Llama's do compute it by the functions below.

    Most decoders of transformers repeat these two layers under names of their own. A layer is one
    of them if it has their parts and gives their numbers, bit for bit, on random input.
    (``transformers.register_patch_mapping`` goes by names, while a model is built: it can't tell
    Llama's norm from Gemma's, which multiplies by 1 + weight.)
    """
    known: dict[tuple[type, type], bool] = {}
    for layer in model.modules():
        forward, width = _candidate(layer)
        if forward is None:
            continue
        kind = type(layer), type(getattr(layer, "act_fn", None))
        if kind not in known:
            known[kind] = _computes(layer, forward, width, model.dtype)
        if known[kind]:
            layer.forward = MethodType(forward, layer)


def _candidate(layer: Any) -> tuple[Callable[[Any, Tensor], Tensor] | None, int]:
    """What may replace the layer's forward pass, by the parts it has, and its width."""
    if hasattr(layer, "variance_epsilon") and isinstance(getattr(layer, "weight", None), Tensor):
        return _norm, layer.weight.shape[-1]
    matrices = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(matrix, nn.Linear) for matrix in matrices):
        return _gated_mlp, layer.gate_proj.in_features
    return None, 0


@torch.no_grad()
def _computes(layer: Any, forward: Any, width: int, dtype: torch.dtype) -> bool:
    """Whether ``forward`` gives the layer's own numbers on a few random tokens."""
    own = type(layer).forward
    if len(inspect.signature(own).parameters) != 2:  # it reads more than tokens
        return False
    tokens = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0))
    tokens = (3 * tokens).to(dtype)  # large enough for a clamp or a cap to show
    expected = own(layer, tokens)
    return isinstance(expected, Tensor) and torch.equal(expected, forward(layer, tokens))


def _norm(norm: Any, hidden_states: Tensor) -> Tensor:
    normalized: Any = RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)
    return normalized


def _gated_mlp(layer: Any, x: Tensor) -> Tensor:
    gated: Any = SwiGLU.apply(layer.gate_proj(x), layer.up_proj(x))
    return layer.down_proj(gated)


class RMSNorm(torch.autograd.Function):
    """w x r with r = (mean(x^2) + eps)^(-1/2) over the last dimension (arXiv:1910.07467).

    With g the gradient of the result, the gradients are

        dx = r (w g - x r^2 mean(w g x))        dw = sum of g x r over tokens

    Arithmetic is in fp32. Under autocast the result is in autocast's precision at once: what reads
    it is a product, and would convert it each time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "*tokens width"],
        weight: Float[Tensor, " width"],
        epsilon: float,
    ) -> Float[Tensor, "*tokens width"]:
        wide = hidden.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        result = (wide * scale if wide is hidden else wide.mul_(scale)).to(hidden.dtype)
        result = result.mul_(weight) if result.dtype == weight.dtype else result * weight
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            result = result.to(torch.get_autocast_dtype(device))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore
        hidden, weight, scale = ctx.saved_tensors
        wide, outer = hidden.float(), gradient.float()
        product = outer * wide
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (scale.reshape(1, -1) @ product.flatten(0, -2))[0].to(weight.dtype)
        mean = (product @ weight.float()).unsqueeze(-1).div_(hidden.shape[-1])
        to_hidden = outer * weight if outer is gradient else outer.mul_(weight)
        to_hidden.addcmul_(wide, mean.mul_(scale).mul_(scale), value=-1).mul_(scale)
        return to_hidden.to(hidden.dtype), to_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202); silu(gate) is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, gate: Float[Tensor, "*tokens width"], up: Float[Tensor, "*tokens width"]
    ) -> Float[Tensor, "*tokens width"]:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        gate, up = ctx.saved_tensors
        to_gate = gradient * up
        silu_backward(to_gate, gate, grad_input=to_gate)
        return to_gate, F.silu(gate).mul_(gradient)
