"""What a teacher is: frozen, spoken to by a fixed text, or adapted to this student.

A specification (frozen dataclass, part of a method) builds the teacher of a run. Every teacher has
a plain voice, p(.|x), and an adapted one, p(.|P, x); for those that adapt nothing they are one.
The soft prompt is ours (PEFT's forward prepends before left pads and drops positions); its files
are PEFT's, and LoRA and prefix tuning are PEFT's altogether.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import peft
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promptkd.divergences import LogProbs
from promptkd.errors import UserError
from promptkd.models import LanguageModel, context_length
from promptkd.objectives import Divergence


@dataclass(frozen=True)
class Adaptation:
    """What moves the teacher: KL(p_P || q) + c_k KL(p_P || p), c_k = regularizer (K - k) / K.

    Both are reverse with respect to the adapted teacher, which learns.

    Source: PromptKD, arXiv:2402.12842, Eq. 1-3.
    """

    towards_student: Divergence = Divergence("reverse_kl")
    towards_itself: Divergence = Divergence("reverse_kl")
    regularizer: float = 1.0

    def coefficient(self, step: int, max_steps: int) -> float:
        """c_k of ``step`` counted from 0: 1 - 1/K in the first, exactly 0 in the last."""
        return self.regularizer * (max_steps - (step + 1)) / max_steps

    def loss(self, adapted: LogProbs, student: LogProbs, plain: LogProbs | None,
             coefficient: float) -> Float[Tensor, " tokens"]:  # fmt: skip
        nats = self.towards_student.between(adapted, student)
        if plain is not None:
            nats = nats + coefficient * self.towards_itself.between(adapted, plain)
        return nats


class Teacher(Protocol):
    """A teacher at work.

    Attributes:
        model: the frozen language model.
        soft_prompt: the vectors in front of its input, if it has any.
    """

    @property
    def model(self) -> LanguageModel: ...

    @property
    def soft_prompt(self) -> Tensor | None: ...

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


class TeacherSpecification(Protocol):
    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher: ...


class PlainTeacher:
    """Frozen, and nothing more."""

    soft_prompt: Tensor | None = None

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

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        return PlainTeacher(model)


class SoftPromptTeacher:
    """Vectors in front of the teacher's input: the soft prompt, fp32, trained or not."""

    def __init__(self, model: LanguageModel, vectors: Float[Tensor, "length width"],
                 trainable: bool):  # fmt: skip
        self.model = model
        self.soft_prompt = nn.Parameter(vectors.clone().float(), requires_grad=trainable)

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
    return load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]


def prompt_vectors(model: LanguageModel, token_ids: Sequence[int]) -> Float[Tensor, "length width"]:
    """The embeddings of tokens, as the trunk receives them."""
    tokens = torch.tensor([list(token_ids)], device=model.device)
    with torch.no_grad():
        return model.module.get_input_embeddings()(tokens)[0].float()


@dataclass(frozen=True)
class SoftPrompt:
    """``length`` trainable vectors in front of the teacher's input.

    They start as the embeddings of ``init_text`` (a longer text is cut, a shorter one repeats), of
    the padding token, or of random tokens. Special tokens of the tokenizer are left out; PEFT and
    the authors keep a start token, which costs OPT's prompt its full stop (paper.md, section 7).

    Source: PromptKD, arXiv:2402.12842, section 3; random and padding start: Fig. 4.
    """

    length: int = 7
    init: Literal["text", "padding", "random"] = "text"
    init_text: str = "Suppose you are a student."
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(
                f"the soft prompt's length is {self.length}: it needs at least one vector. "
                "For a teacher without a prompt use teacher='frozen'."
            )

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        context = context_length(model.module.config)
        if context is not None and self.length >= context:
            raise UserError(
                f"The soft prompt has {self.length} vectors, the teacher's context "
                f"{context} positions: nothing is left for the text. Use a shorter prompt."
            )
        return SoftPromptTeacher(model, self._start(model, tokenizer), trainable=True)

    def _start(self, model: LanguageModel, tokenizer: Any) -> Tensor:
        if self.init == "padding":
            pad = tokenizer.pad_token_id
            ids = [tokenizer.eos_token_id if pad is None else pad]
        elif self.init == "random":
            generator = torch.Generator().manual_seed(self.seed)
            ids = torch.randint(model.vocabulary, (self.length,), generator=generator).tolist()
        else:
            ids = tokenizer(self.init_text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"init_text {self.init_text!r} has no tokens to start the prompt from.")
        repeated = [ids[position % len(ids)] for position in range(self.length)]
        return prompt_vectors(model, repeated)


@dataclass(frozen=True)
class TextPrompt:
    """A fixed written text in front of the teacher's input: nothing is learned."""

    text: str = "Suppose you are a student."

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        ids = tokenizer(self.text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"The text prompt {self.text!r} has no tokens.")
        return SoftPromptTeacher(model, prompt_vectors(model, ids), trainable=False)


TEACHERS: dict[str, type[TeacherSpecification]] = {
    "frozen": Frozen,
    "soft_prompt": SoftPrompt,
    "text_prompt": TextPrompt,
}
