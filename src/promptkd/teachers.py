"""What a teacher is: frozen, prompted by a fixed text, or adapted to this student.

A specification (frozen dataclass, part of a method) builds the teacher of a run. Every teacher has
a plain distribution, p(.|x), and an adapted one, p(.|P, x); without adaptation they are equal.
The soft prompt is ours (PEFT's forward prepends before left pads and drops positions); its files
are PEFT's. LoRA and prefix tuning: ``adapters``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import peft
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promptkd.divergences import LogProbs
from promptkd.errors import UserError
from promptkd.keys import suggest
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import context_length
from promptkd.objectives import Divergence


@dataclass(frozen=True)
class Adaptation:
    """What moves the teacher: KL(p_P || q) + c_k KL(p_P || p), c_k = regularizer (K - k) / K.

    Both are reverse with respect to the adapted teacher, which learns. Without ``anneal`` c_k is
    the regularizer in every step.

    Source: PromptKD, arXiv:2402.12842, Eq. 1-3.
    """

    towards_student: Divergence = Divergence("reverse_kl")
    towards_itself: Divergence = Divergence("reverse_kl")
    regularizer: float = 1.0
    anneal: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.regularizer < math.inf:
            raise ValueError(
                f"regularizer is {self.regularizer}: finite and not negative, which would drive "
                "the teacher away from itself. Use 0 to leave it out."
            )

    def coefficient(self, step: int, max_steps: int) -> float:
        """c_k of ``step`` counted from 0; annealed, 1 - 1/K in the first, exactly 0 in the last."""
        if not self.anneal:
            return self.regularizer
        return self.regularizer * (max_steps - (step + 1)) / max_steps


@runtime_checkable
class Teacher(Protocol):
    """A teacher at work.

    Attributes:
        model: the frozen language model.
        soft_prompt: the vectors in front of its input, if it has any.
        front_length: how many positions are in front of its text.
        has_adapter: whether ``save`` writes one.
    """

    @property
    def model(self) -> LanguageModel: ...

    @property
    def soft_prompt(self) -> Tensor | None: ...

    @property
    def front_length(self) -> int: ...

    @property
    def has_adapter(self) -> bool: ...

    def parameters(self) -> list[nn.Parameter]:
        """What adaptation trains; empty if nothing."""
        ...

    def hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        """Of the adapted teacher."""
        ...

    def plain_hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        """Of the teacher as it came."""
        ...

    def target(self, student: LogProbs, teacher: LogProbs) -> LogProbs:
        """What the student is compared with."""
        ...

    def observe(self, loss: float, progress: float) -> None:
        """Told after each step: the student's loss (nats per token), and the training done."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, directory: Path, name: str) -> None:
        """Write the adapter in PEFT's format; nothing if there is none. ``name``: the teacher's."""
        ...


@runtime_checkable
class TeacherSpecification(Protocol):
    """What a method says of its teacher.

    Attributes:
        learns: whether it has parameters, which an ``Adaptation`` must then move.
    """

    @property
    def learns(self) -> bool: ...

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher: ...


class PlainTeacher:
    """Frozen, and nothing more."""

    soft_prompt: Tensor | None = None
    front_length: int = 0
    has_adapter = False

    def __init__(self, model: LanguageModel):
        self.model = model

    def parameters(self) -> list[nn.Parameter]:
        return []

    def hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        return self.model.hidden_states(tokens)

    def plain_hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        return self.model.hidden_states(tokens)

    def target(self, student: LogProbs, teacher: LogProbs) -> LogProbs:
        return teacher

    def observe(self, loss: float, progress: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state

    def save(self, directory: Path, name: str) -> None:
        pass


@dataclass(frozen=True)
class Frozen:
    """The teacher as it is."""

    learns = False

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        return PlainTeacher(model)


class SoftPromptTeacher:
    """Vectors in front of the teacher's input: the soft prompt, fp32, trained or not."""

    has_adapter = True

    def __init__(
        self, model: LanguageModel, vectors: Float[Tensor, "length width"], trainable: bool
    ):
        self.model = model
        self.soft_prompt = nn.Parameter(vectors.clone().float(), requires_grad=trainable)
        self.front_length = len(vectors)

    def parameters(self) -> list[nn.Parameter]:
        return [self.soft_prompt] if self.soft_prompt.requires_grad else []

    def hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        return self.model.hidden_states(tokens, self.soft_prompt)

    def plain_hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        return self.model.hidden_states(tokens)

    def target(self, student: LogProbs, teacher: LogProbs) -> LogProbs:
        return teacher

    def observe(self, loss: float, progress: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"prompt_embeddings": self.soft_prompt.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.soft_prompt.copy_(state["prompt_embeddings"])

    def save(self, directory: Path, name: str) -> None:
        save_soft_prompt(self.soft_prompt.detach(), directory, name)


def save_soft_prompt(vectors: Float[Tensor, "length width"], directory: Path, name: str) -> None:
    """Write vectors as a PEFT prompt-tuning adapter of the model ``name``."""
    directory.mkdir(parents=True, exist_ok=True)
    config = peft.PromptTuningConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        num_virtual_tokens=vectors.shape[0],
        token_dim=vectors.shape[1],
        num_transformer_submodules=1,
        prompt_tuning_init=peft.PromptTuningInit.RANDOM,
        base_model_name_or_path=name,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    save_file(
        {"prompt_embeddings": vectors.cpu().contiguous()},
        directory / "adapter_model.safetensors",
    )


def load_soft_prompt(directory: Path) -> Float[Tensor, "length width"]:
    """Raises UserError if the file is damaged."""
    try:
        return load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{directory} is damaged ({error}). Train the run again.") from None


def prompt_vectors(model: LanguageModel, token_ids: Sequence[int]) -> Float[Tensor, "length width"]:
    """The embeddings of tokens, as the trunk receives them."""
    tokens = torch.tensor([list(token_ids)], device=model.device)
    with torch.no_grad():
        return model.module.get_input_embeddings()(tokens)[0].float()


STARTS = ("text", "padding", "random")


@dataclass(frozen=True)
class FromTokens:
    """``length`` positions in front of the teacher's text that start as tokens, and learn.

    Args:
        init: start from the tokens of ``init_text`` (a longer text is cut, a shorter one repeats),
            from the "padding" token, or from "random" ones. Special tokens of the tokenizer are
            left out; PEFT and the authors keep a start token, which costs OPT's prompt its full
            stop.
        seed: of the random ones.
    """

    length: int = 7
    init: str = "text"
    init_text: str = "Suppose you are a student."
    seed: int = 0

    learns = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(
                f"length is {self.length}: what is put in front of the teacher has at least one "
                "position. For a teacher with nothing in front use teacher='frozen'."
            )
        if self.init not in STARTS:
            raise ValueError(f"init is '{self.init}'{suggest(self.init, list(STARTS))}")

    def start(self, model: LanguageModel, tokenizer: Any) -> list[int]:
        """The ``length`` tokens.

        Raises:
            UserError: if they fill the teacher's context, or the text has none.
        """
        context = context_length(model.module.config)
        if context is not None and self.length >= context:
            raise UserError(
                f"The teacher gets {self.length} positions in front, its context has {context}: "
                "nothing is left for the text. Use a smaller length."
            )
        if self.init == "padding":
            pad = tokenizer.pad_token_id
            ids = [tokenizer.eos_token_id if pad is None else pad]
        elif self.init == "random":
            generator = torch.Generator().manual_seed(self.seed)
            ids = torch.randint(model.vocabulary, (self.length,), generator=generator).tolist()
        else:
            ids = tokenizer(self.init_text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"init_text {self.init_text!r} has no tokens to start from.")
        return [ids[position % len(ids)] for position in range(self.length)]


@dataclass(frozen=True)
class SoftPrompt(FromTokens):
    """``length`` trainable vectors in front of the teacher's input.

    Source: PromptKD, arXiv:2402.12842, section 3; random and padding start: Fig. 4.
    """

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        vectors = prompt_vectors(model, self.start(model, tokenizer))
        return SoftPromptTeacher(model, vectors, trainable=True)


@dataclass(frozen=True)
class TextPrompt:
    """A fixed text in front of the teacher's input: nothing is learned."""

    text: str = "Suppose you are a student."

    learns = False

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        ids = tokenizer(self.text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"The text prompt {self.text!r} has no tokens.")
        return SoftPromptTeacher(model, prompt_vectors(model, ids), trainable=False)


@dataclass(frozen=True)
class Interpolated:
    """The target walks from the student to the teacher: softmax((1 - t) z_student + t z_teacher).

    The student's part carries no gradient. With L the student's loss and k/K the progress,

        rho = (L_before - L) / L_before;  m <- momentum m + (1 - momentum) rho
        t <- min(end, max(start + (end - start) k/K, t + step_size sigmoid(m) (1 - t)))

    L is the KL, as the paper writes it; the code's cross-entropy differs by the target's entropy,
    which changes with t and so enters rho.

    Source: TAID, arXiv:2501.16937, Eq. 3-7.
    """

    start: float = 0.4
    end: float = 1.0
    step_size: float = 5e-4
    momentum: float = 0.99

    learns = False

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"the teacher's share goes from {self.start} to {self.end}: "
                "give 0 <= start <= end <= 1."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}: an average's share lies in [0, 1).")
        if not 0 <= self.step_size <= 1:
            raise ValueError(f"step_size is {self.step_size}: it lies in [0, 1].")

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        return InterpolatedTeacher(model, self)


class InterpolatedTeacher(PlainTeacher):
    """A frozen teacher whose share of the target grows; see ``Interpolated``."""

    def __init__(self, model: LanguageModel, rule: Interpolated):
        self.model = model
        self.rule = rule
        self.share = rule.start
        self.momentum = 0.0
        self.previous_loss: float | None = None

    def target(self, student: LogProbs, teacher: LogProbs) -> LogProbs:
        """Log-probabilities serve as logits: softmax doesn't see what is added to all."""
        if self.share == 1:
            return teacher
        return ((1 - self.share) * student + self.share * teacher).log_softmax(-1)

    def observe(self, loss: float, progress: float) -> None:
        rule = self.rule
        if self.previous_loss:
            improvement = (self.previous_loss - loss) / self.previous_loss
            self.momentum = rule.momentum * self.momentum + (1 - rule.momentum) * improvement
        self.previous_loss = loss
        push = rule.step_size * (1 - self.share) / (1 + math.exp(-self.momentum))
        linear = rule.start + (rule.end - rule.start) * progress
        self.share = min(rule.end, max(linear, self.share + push))

    def state_dict(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "momentum": self.momentum,
            "previous_loss": self.previous_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share = state["share"]
        self.momentum = state["momentum"]
        self.previous_loss = state["previous_loss"]
