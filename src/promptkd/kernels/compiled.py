"""What torch's compiler makes of a model's layers and of the losses: fewer passes over memory.

Between matmuls a layer is norms, rotations, gates and sums; between the logits and their gradients
a loss is exponentials and sums. One by one each reads and writes everything; compiled they are
fused. Attention stays as it is (``attention``), so a layer becomes a few functions around it.

Layers of one kind share their compiled functions, and so do shapes: sizes are arguments. What makes
another: a model's precision, with or without gradient, one row or several, and how they are masked.
"""

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from promptkd.errors import UserError

BACKEND = "inductor"
"""Of ``torch.compile``."""
MOST_VARIANTS = 64
"""Of one function; torch's own limit, 8, is less than two models of one kind need."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called; sizes are its arguments."""
    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    return torch.compile(function, dynamic=True, backend=BACKEND)


def layers_of(module: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model consists of, if it says which they are; else none."""
    names = set(module._no_split_modules or ())
    return [part for part in module.modules() if type(part).__name__ in names]


def compile_layers(module: PreTrainedModel, device: torch.device) -> None:
    """Let a model's layers be compiled when they first pass something through without a cache.

    While a model generates, it reads with a cache, and its layers stay as they are.

    Raises:
        UserError: if the model doesn't say which its layers are, or nothing can be compiled here.
    """
    layers = layers_of(module)
    if not layers:
        raise UserError(
            f"kernels is compiled, but {type(module).__name__} doesn't say which of its parts are "
            "layers (_no_split_modules). Set kernels: plain."
        )
    refuse_missing_compiler(device)
    for layer in layers:
        layer.forward = MethodType(_forward, layer)


def is_compiled(module: PreTrainedModel) -> bool:
    """Whether ``compile_layers`` was called with the model, or with what it is a copy of."""
    return any(getattr(layer.forward, "__func__", None) is _forward for layer in layers_of(module))


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    has_cache = any(isinstance(given, Cache) for given in (*args, *kwargs.values()))
    own = type(layer).forward
    return (own if has_cache else _shared(own))(layer, *args, **kwargs)


@cache
def _shared(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One compilation for all layers of a kind, whichever model they belong to."""
    return compiled(forward)


@cache
def refuse_missing_compiler(device: torch.device) -> None:
    """Try the compiler on one small function.

    Raises:
        UserError: if there is none for this device, with what it says.
    """
    try:
        compiled(lambda numbers: numbers.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # torch raises whatever its parts do
        said = " ".join(str(error).partition("Set TORCHDYNAMO")[0].split())
        needed = "a C++ compiler (g++, or the one that CXX names)"
        if device.type == "cuda":
            needed = "Triton, which comes with torch, and a C compiler (gcc)"
        raise UserError(
            f"kernels is compiled, but nothing can be compiled for the device {device} here "
            f"({said:.160}). Install {needed}, or set kernels: plain."
        ) from None
