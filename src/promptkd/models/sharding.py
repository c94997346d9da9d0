"""Models that several processes keep together: each has a part of every weight (FSDP2).

Layer by layer, weights are gathered for a pass and given back, or stay for a whole step. What a
pass reads outside its layers (embeddings, output layer) stays gathered until ``release``.

Gradients are summed over processes, not averaged: a token's weight knows the whole step already.
Each backward pass sums those of the layers, the last of a step the others. LoRA adapters and
vectors (norms, biases) stay whole, everywhere: they are small.

Of a student with fp32 weights that multiplies in bf16, autocast rounds a layer's matrices before
each product. Here each process rounds its own part, and the rounded parts are gathered: the same
numbers, half the bytes. What a pass reads unrounded (embeddings) is gathered as it is stored.

What passes through such a model is a matter of all processes at once, pass by pass. What each does
alone (writing, scoring, saving) is done with a ``WholeModel``.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import P2POp, batch_isend_irecv, irecv, isend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from promptkd.errors import UserError
from promptkd.kernels.compiled import layers_of
from promptkd.models.loaded_once import is_adapter


def shard(
    module: PreTrainedModel,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    stays: bool = False,
) -> None:
    """Leave this process its part of every weight, in place; all processes have the same model.

    Each layer is a group that is gathered at once, and the rest of the model is one. Layer by
    layer, the first process sends its weights to all, and each keeps its part: no more than one
    whole layer is on ``device`` at a time.

    Args:
        module: whole on the first process, with weights of any content on the others
            (``loaded_once``); adapters are everywhere.
        device: of this process.
        dtype: what autocast multiplies in; None where weights are stored so.
        offload: whether this process's parts of the layers, which are frozen, stay in the machine's
            memory and are fetched to be gathered.
        stays: whether layers stay gathered until ``release``.

    Raises:
        UserError: if the model doesn't say which its layers are.
    """
    layers = _layers(module)
    small = [own for name, own in module.named_parameters() if is_adapter(name) or own.dim() < 2]
    for own in small:
        _receive(own, device)
    whole = set(small)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in (*layers, module):
        for own in part.parameters():
            if own not in whole and not isinstance(own, DTensor):
                _receive(own, device)
        policies: dict[str, Any] = {"mp_policy": _precision(part, dtype), "offload_policy": place}
        policies = policies | {"reshard_after_forward": not stays} if part is not module else {}
        own_group: Any = fully_shard(part, mesh=mesh, ignored_params=whole, **policies)
        own_group.set_reshard_after_backward(part is not module and not stays, recurse=False)
        _sum_gradients(part, device)
    entered: Any = module
    entered.promptkd_enter = MethodType(lambda self, function, *given: function(*given), module)
    register_fsdp_forward_method(module, "promptkd_enter")


def _sum_gradients(part: Any, device: torch.device) -> None:
    """Over processes, not averaged."""
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)  # gloo has no other way to not average
    if device.type != "cuda":
        part.set_custom_reduce_scatter(SummedByExchange())


def _layers(module: PreTrainedModel) -> list[nn.Module]:
    layers = layers_of(module)
    if not layers:
        raise UserError(
            f"sharding is fsdp, but {type(module).__name__} doesn't say which of its parts are "
            "layers (_no_split_modules), so its weights can't be shared. Set sharding: none."
        )
    return layers


class SummedByExchange:
    """Sums gradients over processes: each sends every other its part, and adds what it gets.

    gloo's own way sums all parts on every process, at five times the processor's time, and cuts.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Float[Tensor, " part"],
        input_tensor: Float[Tensor, " all"],
        group: torch.distributed.ProcessGroup,
        **given: Any,
    ) -> None:
        own, number = group.rank(), group.size()
        parts = input_tensor.view(number, -1)
        output_tensor.copy_(parts[own])
        received = torch.empty_like(output_tensor)
        for distance in range(1, number):
            to, of = (own + distance) % number, (own - distance) % number
            talk = [
                P2POp(isend, parts[to], group=group, group_peer=to),
                P2POp(irecv, received, group=group, group_peer=of),
            ]
            for message in batch_isend_irecv(talk):
                message.wait()
            output_tensor += received


def _precision(layer: nn.Module, dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """How a layer is gathered: in ``dtype`` where it has no matrix that autocast doesn't round."""
    linear = {part.weight for part in layer.modules() if isinstance(part, nn.Linear | Conv1D)}
    if dtype is None or any(own.dim() > 1 and own not in linear for own in layer.parameters()):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _receive(own: nn.Parameter, device: torch.device) -> None:
    """Let a weight be the first process's, on ``device``."""
    if torch.distributed.get_rank() == 0:
        own.data = own.data.to(device)
    else:
        own.data = torch.empty(own.shape, dtype=own.dtype, device=device)
    torch.distributed.broadcast(own.data, 0)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def enter(module: nn.Module, function: Callable[..., Tensor], *given: Any) -> Tensor:
    """Call ``function`` where all weights can be read: those of layers in the layers' passes."""
    if not is_sharded(module):
        return function(*given)
    entered: Any = module
    return entered.promptkd_enter(function, *given)


def gather_ends(module: nn.Module) -> None:
    """Let weights outside the layers be read from now on, the output layer's for instance."""
    if isinstance(module, FSDPModule):
        module.unshard()


def expect_gradients(module: PreTrainedModel, last: bool) -> None:
    """Before a student's backward pass: what its embeddings' and output layer's gradient adds to.

    Behind the ``last`` pass of a step these weights are given back, and processes sum the gradient;
    until then both stay whole.
    """
    if not isinstance(module, FSDPModule):
        return
    module.set_requires_gradient_sync(last, recurse=False)
    module.set_reshard_after_backward(last, recurse=False)
    embeddings: Any = module.get_input_embeddings()
    weight = embeddings.weight
    if weight.requires_grad and weight.grad is None:  # else a sparse one, which can't be cut
        weight.grad = torch.zeros_like(weight)


def release(*modules: nn.Module) -> None:
    """Give back what is gathered: necessary before weights change or are listed."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def most(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Of each number, the largest that any process has: so often all pass through the model."""
    tensor = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def whole(state: Any) -> Any:
    """Nested state, its sharded tensors whole on the first process and empty on the others.

    All processes must ask.
    """
    if isinstance(state, DTensor):
        value = state.full_tensor()
        return value.cpu() if torch.distributed.get_rank() == 0 else value.new_empty(0)
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


def part_like(own: Tensor, value: Any) -> Any:
    """This process's part of ``value``, if that belongs to a sharded parameter ``own``."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


class WholeModel:
    """A plain model that has the weights of one in parts while they are gathered, else none.

    Args:
        module: not yet sharded.
        device: of this process.
        dtype: of the gathered weights; None: as they are stored.

    Attributes:
        module: the plain model.
    """

    def __init__(
        self, module: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None
    ):
        self._in_parts, self._device, self._dtype = module, device, dtype
        hollow = {id(own): nn.Parameter(self._hollow(own), False) for own in module.parameters()}
        self.module: PreTrainedModel = copy.deepcopy(module, dict(hollow)).eval()
        for part in self.module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(device)

    @contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """With the weights as they are now, on every process; all of them must ask."""
        self._fill(self._dtype, lambda value: value)
        yield self.module
        self._empty()

    @contextmanager
    def on_first(self) -> Iterator[PreTrainedModel]:
        """The same on the first process alone, on the CPU and as the weights are stored."""
        first = torch.distributed.get_rank() == 0
        self._fill(None, Tensor.cpu if first else self._hollow)
        yield self.module
        self._empty()

    def _fill(self, dtype: torch.dtype | None, convert: Callable[[Tensor], Tensor]) -> None:
        """Rounded in parts, then gathered: the same numbers as the other way round."""
        release(self._in_parts)
        for ours, theirs in self._pairs():
            value = theirs.detach().to(self._device, dtype or theirs.dtype)
            ours.data = convert(value.full_tensor() if isinstance(value, DTensor) else value)

    def _empty(self) -> None:
        for ours, theirs in self._pairs():
            ours.data = self._hollow(theirs)

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self.module.parameters(), self._in_parts.parameters(), strict=True)

    def _hollow(self, like: Tensor) -> Tensor:
        """The shape of a tensor as it will be gathered, and one number in memory."""
        number = torch.zeros((), dtype=self._dtype or like.dtype, device=self._device)
        return number.expand(like.shape)
