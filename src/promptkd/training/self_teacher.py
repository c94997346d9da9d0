"""A teacher that is the student itself: as it started, its moving average, or as it is now.

    frozen   p = q_0               the student before its first step
    ema      p <- decay p + (1 - decay) q        after every step
    live     p = q, without gradient

Weights that don't differ from the student's are the student's own tensors: none is held twice.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.composition import Method
from promptkd.config import TeacherSection
from promptkd.errors import UserError
from promptkd.models.loading import load_model


class MovingAverage:
    """The weights of a model that follows another one slowly, in fp32; part of checkpoints."""

    def __init__(self, module: PreTrainedModel, student: PreTrainedModel, decay: float):
        self.module = module
        self.decay = decay
        ours, theirs = dict(module.named_parameters()), dict(student.named_parameters())
        self._pairs = {
            name: (ours[name], value) for name, value in theirs.items() if value.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step of the student."""
        for average, now in self._pairs.values():
            average.lerp_(now.detach().to(average.dtype), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: average for name, (average, _) in self._pairs.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, (average, _) in self._pairs.items():
            average.copy_(state[name])


def self_teacher(
    section: TeacherSection,
    student: PreTrainedModel,
    name: str,
    dtype: torch.dtype,
    compiled: bool,
) -> tuple[PreTrainedModel, MovingAverage | None]:
    """The student as its own teacher, without gradient; its average where it is one.

    Args:
        section: says whom it follows.
        student: loaded, with its adapters if it has some.
        name: that the student was loaded by.
        dtype: of a frozen copy's weights.
        compiled: whether its layers are; those of a copy over the student's weights are as its own.
    """
    if section.follow == "live":
        return _shadow(student, lambda own: nn.Parameter(own.detach(), requires_grad=False)), None
    if section.follow == "ema":
        module = _shadow(student, lambda own: _frozen_copy(own) if own.requires_grad else own)
        return module, MovingAverage(module, student, section.ema_decay)
    if any(isinstance(part, BaseTunerLayer) for part in student.modules()):
        return _without_adapters(_shadow(student, lambda own: own)), None
    module = load_model(name, dtype, student.device, compiled=compiled)
    return module.requires_grad_(False), None


def refuse_moving_author(section: TeacherSection, method: Method) -> None:
    """Refuse to keep what a teacher wrote that is another one in the next step.

    Raises:
        UserError: naming the method.
    """
    if section.follow != "frozen" and any(term.rollouts.asks_teacher for term in method.terms):
        raise UserError(
            f"The method '{method.name}' lets its teacher write once and for all, but "
            f"teacher.follow: {section.follow} changes it in every step. Use follow: frozen, or a "
            "method whose student writes: sdft, gkd, promptkd."
        )


def _shadow(
    module: PreTrainedModel, parameter: Callable[[nn.Parameter], nn.Parameter]
) -> PreTrainedModel:
    """The same model over other parameters: ``parameter`` says which, for each of its own."""
    memo: dict[int, Any] = {id(own): parameter(own) for own in module.parameters()}
    copied: Any = copy.deepcopy(module, memo)
    if copied.is_gradient_checkpointing:
        copied.gradient_checkpointing_disable()
    return copied.eval()


def _frozen_copy(own: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(own.detach().float().clone(), requires_grad=False)


def _without_adapters(module: PreTrainedModel) -> PreTrainedModel:
    """The base of an adapted model; its adapters are taken out of this copy alone."""
    layers: list[tuple[str, Any]] = [
        (name, part) for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)
    ]
    for name, layer in layers:
        module.set_submodule(name, layer.base_layer)
    del module.peft_config  # pyright: ignore[reportAttributeAccessIssue]
    return module
