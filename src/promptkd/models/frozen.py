"""A frozen teacher in less of the device's memory: quantised, or fetched when it is multiplied.

    y = x W'^T        dx = dy W'        W' made anew for each product, and forgotten after it

W' is the weight in the precision that is multiplied: made of 8 or 4 bits and scales, or fetched
from the machine's memory. So a graph keeps no W', however long it lives, and a soft prompt gets its
gradient through the weights that wrote.

bitsandbytes quantises; its products aren't used. In 8 bits they round the tokens too and depend on
which other tokens stand in the batch. In 4 bits, on processors (0.50.2), the first pass without
gradient lays the weights out anew, after which none comes through them, and matrices whose rows
aren't whole blocks are restored wrongly.
"""

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig, PreTrainedModel

from promptkd.errors import UserError

LEVELS = 127
"""Steps of an 8-bit integer to each side of 0."""


@dataclass(frozen=True)
class Storage:
    """How the weights of a model that doesn't learn are held.

    Attributes:
        quantization: of its linear layers, embeddings and output layer aside.
        offload: whether its linear layers stay in the machine's memory until they are multiplied.
    """

    quantization: Literal["8bit", "4bit"] | None = None
    offload: bool = False

    def refuse_missing(self, device: torch.device) -> None:
        """Refuse what this machine can't do.

        Raises:
            UserError: with the package to install, or the key to leave out.
        """
        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"teacher.quantization is {self.quantization}, for which bitsandbytes is not "
                "installed. Run: pip install 'promptkd[quantization]', or leave the key out."
            )
        if self.offload and device.type == "cpu":
            raise UserError(
                "teacher.offload is true, but this run computes on the CPU, where the teacher's "
                "weights are anyway. Leave it out."
            )

    def loading(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """What ``from_pretrained`` is told: weights are quantised one by one, on the device."""
        if self.quantization is None:
            return {}
        if self.quantization == "8bit":
            config = BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        return {"quantization_config": config, "device_map": {"": str(device)}}

    def apply(self, module: PreTrainedModel, name: str) -> None:
        """Give a loaded model the layers of this storage, in place.

        Raises:
            UserError: if offloading finds no linear layer.
        """
        trunk: Any = module.base_model
        if self.quantization:
            quantized = Int8Linear if self.quantization == "8bit" else NF4Linear
            for place, layer in _linear_layers(trunk):
                if not layer.weight.is_floating_point():
                    trunk.set_submodule(place, quantized(layer))
        if self.offload:
            layers = _linear_layers(trunk)
            if not layers:
                raise UserError(
                    f"teacher.offload is true, but {name} ({type(module).__name__}) has no linear "
                    "layers of torch's kind that could be fetched one by one. Leave it out."
                )
            for place, layer in layers:
                trunk.set_submodule(place, OffloadedLinear(layer))


WHOLE = Storage()


def _linear_layers(trunk: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(place, part) for place, part in trunk.named_modules() if isinstance(part, nn.Linear)]


class FrozenLinear(nn.Linear, ABC):
    """A linear layer whose weight gets no gradient and is held in a form of its own."""

    def __init__(self, layer: nn.Linear, weight: Tensor):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias

    @abstractmethod
    def restored(self, like: Tensor) -> Float[Tensor, "rows width"]:
        """W', on the device and in the precision of ``like``."""

    def forward(self, input: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens rows"]:
        product: Any = _Product.apply(input, self)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(tokens)
        return F.linear(tokens, layer.restored(tokens), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient @ ctx.layer.restored(gradient), None


class Int8Linear(FrozenLinear):
    """W' = s q row by row, q integers from -127 to 127 and s the row's largest magnitude / 127."""

    weight: Int8[Tensor, "rows width"]

    def __init__(self, layer: nn.Linear):
        packed: Any = layer.weight
        super().__init__(layer, packed.data)
        self.scale = nn.Parameter(packed.SCB.float() / LEVELS, requires_grad=False)

    def restored(self, like: Tensor) -> Float[Tensor, "rows width"]:
        return torch.mul(self.weight, self.scale[:, None], out=like.new_empty(self.weight.shape))


class NF4Linear(FrozenLinear):
    """W' = s c[q] in blocks: q two 4-bit integers a byte, c the quantiles of a normal distribution.

    Source: QLoRA, arXiv:2305.14314, section 3.
    """

    weight: UInt8[Tensor, "bytes 1"]
    pairs: Float[Tensor, "256 2"]

    def __init__(self, layer: nn.Linear):
        packed: Any = layer.weight
        super().__init__(layer, packed.data)
        state = packed.quant_state
        self.scale = nn.Parameter(state.absmax.float(), requires_grad=False)
        pairs = torch.cartesian_prod(state.code, state.code)  # of every byte, high half first
        self.register_buffer("pairs", pairs, persistent=False)
        self._block = state.blocksize

    def restored(self, like: Tensor) -> Float[Tensor, "rows width"]:
        values = F.embedding(self.weight.flatten().int(), self.pairs.to(like.dtype)).flatten()
        num_values = len(values)
        blocks = F.pad(values, (0, -num_values % self._block)).view(-1, self._block)
        restored = blocks.mul_(self.scale[:, None]).flatten()[:num_values]
        return restored.view(self.out_features, self.in_features)


class OffloadedLinear(FrozenLinear):
    """W' is fetched from the machine's memory, page-locked where there is a GPU to fetch it."""

    def __init__(self, layer: nn.Linear):
        weight = layer.weight.data
        super().__init__(layer, weight.pin_memory() if torch.cuda.is_available() else weight)

    def restored(self, like: Tensor) -> Float[Tensor, "rows width"]:
        return self.weight.to(like, non_blocking=True)

    def _apply(self, fn: Any, recurse: bool = True) -> "OffloadedLinear":
        """Stays where it is when its model moves; the bias goes along."""
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self
