"""Teachers that PEFT's adapters move: LoRA and prefix tuning.

Any of them can take the soft prompt's place, and all are saved as PEFT would:
``PeftModel.from_pretrained(teacher, path)`` is the adapted teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from promptkd.errors import UserError
from promptkd.models import sharding
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import adapter_config
from promptkd.teachers import FromTokens, PlainTeacher, Teacher, load_soft_prompt


@dataclass(frozen=True)
class LoRA:
    """W + alpha / r B A in the teacher's projections, B = 0 at first.

    Args:
        r: the rank of B A.
        alpha: the update is scaled by alpha / r.
        target_modules: names of the layers; empty for PEFT's choice for the architecture
            (GPT-2: the attention's joint projection; OPT and Llama: queries and values),
            "all-linear" for every linear layer except the output layer.
        seed: of A.

    Source: Hu et al. 2021, arXiv:2106.09685; rank and alpha: PromptKD, arXiv:2402.12842, Table 9.
    """

    r: int = 4
    alpha: int = 32
    target_modules: Sequence[str] = ()
    seed: int = 0

    learns = True

    def __post_init__(self) -> None:
        if not (1 <= self.r <= 4096 and 1 <= self.alpha <= 10**6):
            raise ValueError(
                f"r is {self.r} and alpha {self.alpha}: r lies in [1, 4096], alpha in [1, 1e6]."
            )

    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        config = add_lora(model.module, self.r, self.alpha, self.target_modules, self.seed)
        return LoRATeacher(model, config)


def add_lora(
    module: PreTrainedModel, rank: int, alpha: int, target_modules: Sequence[str], seed: int
) -> peft.LoraConfig:
    """Put fp32 adapters into a model, in place; everything else in it is frozen.

    Raises:
        UserError: if the model has no such layers, or PEFT doesn't know its architecture.
    """
    layers = target_modules if isinstance(target_modules, str) else [*target_modules]
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        target_modules=layers or None,
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, module)
        except ValueError as error:
            raise UserError(
                f"LoRA does not fit {type(module).__name__}: {error} Name the layers that it has "
                "in target_modules."
            ) from None
    ends = (module.get_output_embeddings(), module.get_input_embeddings())
    if any(isinstance(layer, BaseTunerLayer) for layer in ends):
        raise UserError(
            f"target_modules {layers} puts LoRA on the embeddings or the output "
            "layer, where it would not be trained: both are read as plain matrices. Leave them out."
        )
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    module.eval()
    return config


class TrainedWeights:
    """What training changes in a model: the adapters, or all of a model that has none."""

    def __init__(self, module: PreTrainedModel):
        self._module = module

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors, on the first process alone if the model is sharded: all must ask."""
        own = self._module.state_dict()
        parameters = self._module.named_parameters()
        frozen = {name for name, value in parameters if not value.requires_grad}
        trained = {name: value for name, value in own.items() if not frozen or "lora_" in name}
        return sharding.whole(trained)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self._module.state_dict()
        parts = {name: sharding.part_like(own[name], value) for name, value in state.items()}
        self._module.load_state_dict(own | parts)


def save_lora(module: PreTrainedModel, directory: Path, base: str) -> None:
    """Write the adapters of a model as PEFT does; ``base`` is what they are read onto."""
    config: Any = module.peft_config["default"]  # pyright: ignore[reportIndexIssue]
    state = peft.get_peft_model_state_dict(module)
    _save(
        config, {f"base_model.model.{key}": value for key, value in state.items()}, directory, base
    )


def merged(module: PreTrainedModel) -> PreTrainedModel:
    """A plain model of its own with the adapters added into the weights; ``module`` stays."""
    layers: list[tuple[str, Any]] = [
        (name, part) for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)
    ]
    updates = {name: layer.get_delta_weight("default") for name, layer in layers}
    state = {}
    for name, value in module.state_dict().items():
        if "lora_" not in name:
            owner, _, leaf = name.rpartition(".base_layer.")
            if leaf == "weight":
                value = (value.float() + updates[owner].float()).to(value.dtype)
            state[name.replace(".base_layer.", ".")] = value
    whole = AutoModelForCausalLM.from_config(module.config, dtype=module.dtype)
    whole.load_state_dict(state)
    whole.generation_config = module.generation_config
    return whole


class LoRATeacher(PlainTeacher):
    """The adapters are switched on for the adapted teacher only; they stay fp32."""

    has_adapter = True

    def __init__(self, model: LanguageModel, config: peft.LoraConfig):
        self.model = model
        self.config = config
        self._layers = [m for m in model.module.modules() if isinstance(m, BaseTunerLayer)]
        self._trained = [p for n, p in model.module.named_parameters() if "lora_" in n]
        self._switch(on=False)

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            layer.enable_adapters(on)
        for parameter in self._trained:  # switching off also freezes them; backward comes later
            parameter.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        return self._trained

    def hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        self._switch(on=True)
        hidden = self.model.hidden_states(tokens)
        self._switch(on=False)
        return hidden

    def state_dict(self) -> dict[str, Any]:
        state = peft.get_peft_model_state_dict(self.model.module)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        peft.set_peft_model_state_dict(self.model.module, state)

    def save(self, directory: Path, name: str) -> None:
        state = {f"base_model.model.{key}": value for key, value in self.state_dict().items()}
        _save(self.config, state, directory, name)


@dataclass(frozen=True)
class Prefix(FromTokens):
    """``length`` trainable keys and values in front of the text, in every layer of the teacher.

    They start as those of the tokens, so the teacher starts as the one that reads these first; PEFT
    starts from random numbers. No reparametrisation.

    Source: Li and Liang 2021, arXiv:2101.00190.
    """

    @torch.no_grad()
    def build(self, model: LanguageModel, tokenizer: Any) -> Teacher:
        start = self.start(model, tokenizer)
        cache: Any = DynamicCache()
        trunk: Any = model.module.base_model
        trunk(torch.tensor([start], device=model.device), past_key_values=cache, use_cache=True)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        if len({keys.shape for keys, _ in pairs} | {values.shape for _, values in pairs}) > 1:
            raise UserError(
                f"The layers of the teacher {type(model.module).__name__} keep keys and values of "
                "different shapes, which a prefix can't take. Use teacher=soft_prompt or lora."
            )
        stacked = torch.stack([torch.cat(pair) for pair in pairs])
        return PrefixTeacher(model, stacked)


class PrefixTeacher(PlainTeacher):
    """Keys and values in front of the teacher's text, fp32, in PEFT's order of axes."""

    has_adapter = True

    def __init__(
        self, model: LanguageModel, keys_values: Float[Tensor, "layers two heads length width"]
    ):
        self.model = model
        self.num_layers, _, self.num_heads, self.front_length, self.width = keys_values.shape
        flat = keys_values.permute(3, 0, 1, 2, 4).reshape(self.front_length, -1)
        self.prefix = nn.Parameter(flat.clone().float())

    def parameters(self) -> list[nn.Parameter]:
        return [self.prefix]

    def cache(self, batch: int) -> DynamicCache:
        """The prefix as every row's past."""
        shape = self.front_length, self.num_layers, 2, self.num_heads, self.width
        layers = self.prefix.to(self.model.module.dtype).view(shape).permute(1, 2, 3, 0, 4)
        cache = DynamicCache(config=self.model.module.config)
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache

    def hidden_states(self, tokens: Int[Tensor, "batch time"]) -> Tensor:
        return self.model.hidden_states(
            tokens, past_key_values=self.cache(len(tokens)), past_length=self.front_length
        )

    def state_dict(self) -> dict[str, Any]:
        return {"prompt_embeddings": self.prefix.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.prefix.copy_(state["prompt_embeddings"])

    def save(self, directory: Path, name: str) -> None:
        config = peft.PrefixTuningConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            num_virtual_tokens=self.front_length,
            token_dim=self.num_heads * self.width,
            num_attention_heads=self.num_heads,
            num_layers=self.num_layers,
            num_transformer_submodules=1,
        )
        _save(config, self.state_dict(), directory, name)


def load_prefix(model: LanguageModel, directory: Path) -> PrefixTeacher:
    """The prefix teacher that was saved in ``directory``.

    Raises:
        UserError: if its configuration and its numbers don't belong together.
    """
    config = adapter_config(directory)
    flat = load_soft_prompt(directory)
    try:
        pairs = flat.view(len(flat), config.num_layers, 2, config.num_attention_heads, -1)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{directory} is damaged ({error}). Train the run again.") from None
    return PrefixTeacher(model, pairs.permute(1, 2, 3, 0, 4).to(model.device))


def _save(config: peft.PeftConfig, state: dict[str, Tensor], directory: Path, name: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = name
    config.inference_mode = True
    config.save_pretrained(str(directory))
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
