"""Parameters and the optimizer that moves them, once a step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from promptkd.models import sharding
from promptkd.ranks import Ranks


@dataclass(frozen=True)
class Learner:
    """Parameters with their optimizer; gradients are clipped together.

    The gradients stay where they are between steps: to fill new pages costs more than zeros.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @property
    def base_rate(self) -> float:
        """The recipe's learning rate, from which a schedule makes each step's."""
        return self.optimizer.defaults["lr"]

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def clip(self, max_norm: float, ranks: Ranks) -> float:
        """Sum the gradients of all processes and clip them; returns their norm before.

        Those of sharded parameters were summed by the backward passes, and torch takes them
        together with no others.
        """
        parts = [own for own in self.parameters if isinstance(own, DTensor)]
        others = [own for own in self.parameters if not isinstance(own, DTensor)]
        norms = [ranks.sum(_gradient(own)) for own in others]
        if parts:
            of_parts: Any = nn.utils.get_total_norm([_gradient(own) for own in parts])
            norms.append(of_parts.full_tensor())
        norm = nn.utils.get_total_norm(norms)
        for own in (parts, others):
            nn.utils.clip_grads_with_norm_(own, max_norm, norm)
        return norm.item()

    def move(self) -> None:
        """One step of the optimizer; the gradients are zero again."""
        self.optimizer.step()
        for parameter in self.parameters:  # the optimizer's own zeros take no mixture of kinds
            _gradient(parameter).zero_()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, of whole tensors on the first process; all processes must ask."""
        return sharding.whole(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = {
            index: {name: sharding.part_like(own[index], value) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": states})


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "there from the start"
    return parameter.grad
