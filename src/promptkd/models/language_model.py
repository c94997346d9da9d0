"""A causal language model in the two halves that every method uses: trunk and head.

The trunk turns tokens into hidden states; the head turns hidden states into log-probabilities,
later and in chunks (``objectives``), so whole logits never exist.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from promptkd.errors import UserError
from promptkd.kernels.attention import can_pack, packed_arguments
from promptkd.kernels.matmul import add_outer, linear
from promptkd.models import sharding

PADDING = -1
"""In place of a token, where a row of tokens has ended or not begun."""


@dataclass(frozen=True)
class Head:
    """From hidden states to log-probabilities over the first ``vocabulary`` token ids.

    Rows beyond the shared token table (padding for the hardware) are left out of the softmax.
    """

    weight: Float[Tensor, "rows width"]
    bias: Float[Tensor, " rows"] | None
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """The plain product, as it is multiplied; ``cap`` and ``normalize`` do the rest in fp32."""
        return linear(hidden.to(self.dtype), *self.matrix)

    def normalize(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Natural-log probabilities in fp32."""
        return self.cap(logits).log_softmax(-1)

    def cap(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Scale and soft-cap (Gemma) applied: log-probabilities up to a constant per token."""
        logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def logprobs(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """Natural-log probabilities of a few tokens, without gradient."""
        return self.normalize(self.logits(hidden))

    @torch.no_grad()
    def backward(
        self, hidden: Float[Tensor, "tokens width"], gradient: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, "tokens width"]:
        """Gradient to the hidden states, from that to ``logits``; the weights' is added in place.

        Autograd would make a matrix of vocabulary x width anew for every chunk of tokens.
        """
        if self.bias is not None and self.bias.requires_grad:
            _gradient_of(self.bias)[: self.vocabulary] += gradient.sum(0)
        weight, _ = self.matrix
        gradient, states = gradient.to(self.dtype), hidden.to(self.dtype)
        if self.weight.requires_grad:
            add_outer(_gradient_of(self.weight)[: self.vocabulary], gradient, states)
        return (gradient @ weight).to(hidden.dtype)

    @cached_property
    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are multiplied; a head lives for a pass, weights don't change."""
        weight = self.weight[: self.vocabulary].to(self.dtype)
        bias = None if self.bias is None else self.bias[: self.vocabulary].to(self.dtype)
        return weight, bias


def _gradient_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, split into trunk and head.

    Attributes:
        module: the transformers model, in evaluation mode (dropout is off); it isn't changed.
        vocabulary: how many token ids are compared; at most the embedding rows of either model.
        dtype: what its matrices are multiplied in; fp32 weights stay fp32 (master weights).
        packing: whether rows of different lengths are laid end to end, so that no matmul sees
            padding; ``proven`` finds out whether the model can.
    """

    module: PreTrainedModel
    vocabulary: int
    dtype: torch.dtype = torch.float32
    packing: bool = False

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def num_trunk_weights(self) -> int:
        """Entries of the matrices that every token is multiplied with, the head's left out."""
        trunk: Any = self.module.base_model
        return sum(
            layer.in_features * layer.out_features  # a quantised weight has fewer entries
            if isinstance(layer, nn.Linear)
            else layer.weight.numel()
            for layer in trunk.modules()
            if isinstance(layer, nn.Linear | Conv1D)
        )

    @property
    def head(self) -> Head:
        sharding.gather_ends(self.module)
        layer: Any = self.module.get_output_embeddings()
        config = self.module.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return Head(
            layer.weight,
            bias=getattr(layer, "bias", None),
            vocabulary=self.vocabulary,
            scale=scale,
            softcap=getattr(config, "final_logit_softcapping", None),
            dtype=self.dtype,
        )

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch time"],
        soft_prompt: Float[Tensor, "length width"] | None = None,
        past_key_values: Any = None,
        past_length: int = 0,
    ) -> Float[Tensor, "batch time width"]:
        """Last hidden states at the tokens (the soft prompt's own are cut off again).

        Positions count the tokens of a row from 0 (from the soft prompt's first vector, if there is
        one). Rows that end early are packed into one, if they can be, and no product sees padding.

        Args:
            tokens: token ids; ``PADDING`` after a row's last or before its first.
            soft_prompt: vectors put in front of the embeddings, as in PromptKD's teacher.
            past_key_values: keys and values put in front (prefix tuning).
            past_length: how many positions they hold.

        Returns:
            Nothing of meaning at padding.
        """
        given = tokens, soft_prompt, past_key_values, past_length
        hidden = sharding.enter(self.module, self._read, *given)
        return hidden[:, hidden.shape[1] - tokens.shape[1] :]

    def _read(
        self, tokens: Tensor, soft_prompt: Tensor | None, past_key_values: Any, past_length: int
    ) -> Tensor:
        """The same, with the soft prompt's own states in front."""
        name, inputs, real = "input_ids", tokens.clamp_min(0), tokens != PADDING
        if soft_prompt is not None:
            name = "inputs_embeds"
            embeddings = self.module.get_input_embeddings()(inputs)
            of_prompt, real = prompt_positions(real, len(soft_prompt))
            inputs = put_in_front(soft_prompt, embeddings, of_prompt)
        real = F.pad(real, (past_length, 0), value=True)
        positions = (real.cumsum(-1) - 1).clamp_min(0)
        ragged = not real.all()
        packed = ragged and not past_length and self.packs(real.shape[1])
        arguments: dict[str, Any] = {name: inputs}
        if packed:
            arguments = packed_arguments(self.module, real.sum(1).tolist())
            arguments[name] = inputs[real][None]
        elif ragged or past_length:
            arguments |= {"attention_mask": real.long(), "position_ids": positions[:, past_length:]}
        trunk: Any = self.module.base_model
        with self.autocast():
            output = trunk(
                **arguments, past_key_values=past_key_values, use_cache=past_key_values is not None
            )
        hidden = output.last_hidden_state
        if packed:
            rows = hidden.new_zeros(*real.shape, hidden.shape[-1])
            rows[real] = hidden[0]
            hidden = rows
        return hidden

    def packs(self, longest: int) -> bool:
        """Whether rows of at most ``longest`` tokens, prompt included, are packed into one."""
        return self.packing and can_pack(self.module, longest)

    def autocast(self) -> Any:
        if self.dtype == self.module.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def select_responses(
    hidden: Float[Tensor, "batch time width"], response_mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "tokens width"]:
    """The states that predict each response token: one position before it. The only shift."""
    return hidden[:, :-1][response_mask[:, 1:]]


def prompt_positions(
    real: Bool[Tensor, "batch time"], length: int
) -> tuple[Bool[Tensor, "batch all"], Bool[Tensor, "batch all"]]:
    """Where a prompt of ``length`` precedes each row's first token, and where rows are real then.

    Padding stays outside: where distance is counted between positions of the rectangle (ALiBi,
    sliding windows, convolutions), padding between prompt and text would count.
    """
    start = real.int().argmax(-1, keepdim=True)
    places = torch.arange(length + real.shape[1], device=real.device)
    of_prompt = (start <= places) & (places < start + length)
    return of_prompt, F.pad(real, (length, 0)) | of_prompt


def put_in_front(
    soft_prompt: Float[Tensor, "length width"],
    embeddings: Float[Tensor, "batch time width"],
    of_prompt: Bool[Tensor, "batch all"],
) -> Float[Tensor, "batch all width"]:
    """The rows of ``embeddings`` with the prompt where ``prompt_positions`` says."""
    rows = F.pad(embeddings, (0, 0, len(soft_prompt), 0))
    prompts = soft_prompt.to(rows.dtype).expand(len(rows), -1, -1)
    return rows.masked_scatter(of_prompt[..., None], prompts)


def proven(model: LanguageModel, name: str) -> LanguageModel:
    """The model with packing, if its packed rows give its own logits, else without.

    Raises:
        UserError: if trunk and head, as split here, don't give them for padded rows either.
    """
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3
    packed = replace(model, packing=True)
    if can_pack(model.module, longest=16) and _largest_error(packed) < tolerance:
        return packed
    padded = replace(model, packing=False)
    worst = _largest_error(padded)
    if not worst < tolerance:
        raise UserError(
            f"{name} ({type(model.module).__name__}): log-probabilities from its trunk and output "
            f"layer differ from its own by {worst:.3g} nats. This architecture does something "
            "that promptkd doesn't know after its output layer, or between the rows of a batch; "
            "please report it."
        )
    return padded


@torch.no_grad()
def _largest_error(model: LanguageModel) -> float:
    """Between the model's own log-probabilities and those of trunk and head.

    In nats; in fp32, where the largest is of more than ten, per ten of them: rounding grows with
    logits, and a model that is sure of itself has large ones. bf16's bound has room for that.
    """
    lengths = 8, 5
    tokens = torch.full((2, max(lengths)), PADDING, device=model.device)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.arange(1, 1 + length, device=model.device)
    tokens.clamp_max_(model.vocabulary - 1)
    try:
        hidden = model.hidden_states(tokens)
    except (RuntimeError, TypeError, ValueError, IndexError):  # its layers know no packed rows
        return math.inf
    worst = torch.tensor(0.0, device=model.device)
    for row, length in enumerate(lengths):
        with model.autocast():
            own = model.module(input_ids=tokens[row : row + 1, :length], use_cache=False)
        expected = own.logits[0, :, : model.vocabulary].float().log_softmax(-1)
        actual = model.head.logprobs(hidden[row, :length])
        error = (actual - expected).abs().max()
        if model.dtype == torch.float32:
            error = error / (expected.abs().max() / 10).clamp_min(1.0)
        worst = worst.maximum(error)  # NaN stays NaN
    return worst.item()
