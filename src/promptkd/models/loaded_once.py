"""What the first process loads for all: the others get it without the weights of its models.

Those follow layer by layer, when the models are shared out (``sharding.shard``). So one process
reads and checks the files, and the others never hold a whole model.
"""

import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import nn
from transformers import PreTrainedModel

from promptkd.errors import UserError

Made = TypeVar("Made")


def by_first(load: Callable[[], Made]) -> Made:
    """What ``load`` returns on the first process; on the others the same with hollow models.

    Raises:
        UserError: on every process, if loading raises it on the first.
    """
    sent: list[bytes | None] = [None]
    if torch.distributed.get_rank() == 0:
        made: Any = None
        try:
            made = load()
        except UserError as error:
            made = error
        stream = io.BytesIO()
        _WithoutWeights(stream).dump(made)
        sent = [stream.getvalue()]
        torch.distributed.broadcast_object_list(sent)
    else:
        torch.distributed.broadcast_object_list(sent)
        assert sent[0] is not None
        made = pickle.loads(sent[0])
    if isinstance(made, UserError):
        raise made
    return made


def is_adapter(name: str) -> bool:
    """Whether a parameter is LoRA's: small, and whole on every process."""
    return "lora_" in name


class _WithoutWeights(pickle.Pickler):
    """Models keep their structure, buffers, ties and adapters; other weights only their shapes."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream)
        self._weights: set[int] = set()

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, PreTrainedModel):
            named = thing.named_parameters()
            self._weights |= {id(value) for name, value in named if not is_adapter(name)}
        if id(thing) in self._weights:
            return _hollow, (thing.shape, thing.dtype, thing.requires_grad)
        if isinstance(thing, MethodType):  # the kernels' own, which a class doesn't know by name
            return _bound, (thing.__func__, thing.__self__)
        return NotImplemented


def _hollow(shape: torch.Size, dtype: torch.dtype, learns: bool) -> nn.Parameter:
    """The shape of a weight, and one number in memory."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), learns)


def _bound(function: Callable[..., Any], to: Any) -> MethodType:
    return MethodType(function, to)
