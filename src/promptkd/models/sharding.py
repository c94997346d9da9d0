"""Models that several processes keep together: each has a part of every weight (FSDP2).

Layer by layer, weights are gathered for a pass and given back. What a pass reads outside its layers
(embeddings, last norm, output layer) stays gathered from ``enter`` until a backward pass has gone
through it, or ``release``. Gradients are summed over processes in fp32, not averaged: a token's
weight knows the whole step already. Everything here does nothing to a model that isn't sharded.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from promptkd import kernels
from promptkd.errors import UserError

Result = TypeVar("Result")


def load_sharded(
    read: Callable[[], PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model that the first process alone reads, and whose weights all of them share.

    The others build it without weights and receive their parts, one weight at a time.

    Args:
        read: the whole model on the CPU.
        device: of this process.
        dtype: what matrices are multiplied in; the layers are gathered in it.

    Raises:
        UserError: on every process, if the first can't read the model.
    """
    module, told = None, [None, None]
    if dist.get_rank() == 0:
        try:
            module = read()
            told = [(module.config, module.generation_config, module.dtype), None]
        except UserError as error:
            told = [None, error]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    config, generation_config, stored = told[0]
    if module is None:
        module = _without_weights(config, stored)
        module.generation_config = generation_config
    weights = {name: value.detach() for name, value in module.state_dict().items()}
    kernels.prepare(module, device)
    _shard(module, device, dtype)
    _receive(module, weights, device)
    return module


def _without_weights(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    made.tie_weights()
    return made.eval()


def _shard(module: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Each layer is a group, and the rest of the model is one.

    The rest is gathered as it is stored: the head's gradient, summed over chunks of tokens, is
    fp32 where the weights are. Layers are gathered in ``dtype``, their inputs stay as they are.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = set(module._no_split_modules or ())
    layers = [part for part in module.modules() if type(part).__name__ in names]
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=whole)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    entrance: Any = type(module)
    entrance.promptkd_run = lambda self, function: function()
    register_fsdp_forward_method(module, "promptkd_run")


def _receive(module: PreTrainedModel, weights: dict[str, Tensor], device: torch.device) -> None:
    first = dist.get_rank() == 0
    parts: dict[int, nn.Parameter] = {}
    state = {}
    for name, own in module.state_dict(keep_vars=True).items():
        if id(own) not in parts:
            if first:
                value = weights[name].to(device)
            else:
                value = torch.empty(own.shape, dtype=own.dtype, device=device)
            dist.broadcast(value, 0)
            if isinstance(own, DTensor):
                value = distribute_tensor(
                    value, own.device_mesh, own.placements, src_data_rank=None
                )
                value = nn.Parameter(value, requires_grad=own.requires_grad)
            parts[id(own)] = value
        state[name] = parts[id(own)]
    module.load_state_dict(state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def enter(module: nn.Module, function: Callable[..., Result], *given: Any, **named: Any) -> Result:
    """Call ``function`` where weights can be read; those of layers only in the layers' passes."""
    if not is_sharded(module):
        return function(*given, **named)
    entered: Any = module
    return entered.promptkd_run(partial(function, *given, **named))


def gather_ends(module: nn.Module) -> None:
    """Let weights outside the layers be read from now on, the output layer's for instance."""
    if isinstance(module, FSDPModule):
        module.unshard()


def release(module: nn.Module) -> None:
    """Give back what is gathered: necessary before weights change or are listed."""
    if isinstance(module, FSDPModule):
        module.reshard()


def agreed(number: int, *modules: nn.Module) -> int:
    """The largest ``number`` of all processes, if they pass through one of the models together."""
    sharded = [module for module in modules if is_sharded(module)]
    if not sharded:
        return number
    largest = torch.tensor(number, device=next(sharded[0].parameters()).device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def full(tensor: Tensor) -> Tensor:
    """A whole tensor; of a sharded one all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Nested state with whole tensors on the first process; others have nothing in their place."""
    if isinstance(state, DTensor):
        value = state.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else value.new_empty(0)
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    return state


def shared_like(tensor: Any, own: Tensor) -> Any:
    """This process's part of a whole tensor, if it belongs to a parameter ``own`` in parts."""
    if not isinstance(own, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != own.shape:
        return tensor
    tensor = tensor.to(own.device)
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def plain_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Whole weights of a plain model that speaks as ``module`` does, one at a time.

    LoRA adapters that are switched on are added into their layers' weights. Tied weights come once.
    All processes of a sharded model must ask.
    """
    release(module)
    adapted = {n: layer for n, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if "lora_" in name or id(value) in seen:
            continue
        seen.add(id(value))
        weight = full(value.detach())
        owner, _, leaf = name.rpartition(".base_layer.")
        layer: Any = adapted.get(owner)
        if leaf == "weight" and not layer.disable_adapters:
            update = layer.get_delta_weight("default").detach()
            weight = (weight.float() + update.float()).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def empty_copy(module: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same form without weights, for ``fill``."""
    copied = _without_weights(module.config, module.dtype).requires_grad_(False)
    copied.generation_config = module.generation_config
    return copied


def fill(
    module: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give ``empty_copy`` its weights, as ``plain_weights`` brings them."""
    for name, value in weights:
        path, _, leaf = name.rpartition(".")
        owner: Any = module.get_submodule(path)
        value = value.to(device, dtype if value.is_floating_point() else value.dtype)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = buffer.to(device)
    module.tie_weights()
