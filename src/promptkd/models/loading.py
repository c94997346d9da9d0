"""Loading causal language models and tokenizers, and what their configurations say."""

import os
from inspect import signature
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from promptkd import kernels
from promptkd.errors import UserError
from promptkd.models.language_model import LanguageModel, proven


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a causal language model for evaluation-mode use, with the kernels of its device.

    A saved LoRA is merged into its base.

    Args:
        name: hub id, directory, ``.gguf`` file, or the directory of a finished run (its student).
        dtype: of the weights.
        device: ``default_device`` if not given.

    Raises:
        UserError: if there is no such model.
    """
    device = device or default_device()
    module: Any = _load(name, dtype).eval()
    if "past_key_values" not in signature(module.base_model.forward).parameters:
        raise UserError(
            f"{name} ({type(module).__name__}) keeps what it has read in a form of its own instead "
            "of transformers' cache, so promptkd can't generate with it. Choose a model with "
            "attention, alone or beside recurrent layers."
        )
    module.to(device)
    kernels.prepare(module, device)
    return module


def load_language_model(
    name: str, precision: str, *, vocabulary: int | None = None, device: torch.device | None = None
) -> LanguageModel:
    """A frozen model to generate and measure with, over the first ``vocabulary`` token ids or all.

    Raises:
        UserError: if there is no such model, or its architecture isn't understood.
    """
    device = device or default_device()
    dtype = compute_dtype(precision, device)
    module = load_model(name, dtype, device).requires_grad_(False)
    return proven(LanguageModel(module, vocabulary or embedding_rows(module), dtype), name)


def _load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    arguments = _location(name)
    adapter = Path(arguments["pretrained_model_name_or_path"])
    if (adapter / "adapter_config.json").is_file():
        base = peft.PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        assert base is not None, "written by save_lora"
        whole = peft.PeftModel.from_pretrained(_load(base, dtype), str(adapter))
        return whole.merge_and_unload()
    try:
        model = AutoModelForCausalLM.from_pretrained(**arguments, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_no_model(name, error)) from None
    if "gguf_file" in arguments:  # a quantised config would be saved with the model otherwise
        config: Any = model.config
        del config.quantization_config
        plain: Any = type(model)(config)
        plain.to(dtype)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        model = plain
    return model


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model name; see ``load_model``."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_location(name))
    except (OSError, ValueError) as error:
        raise UserError(_no_model(name, error)) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {name} has no end-of-sequence token; responses need one."
        )
    return tokenizer


def model_directory(name: str) -> str:
    """A run's directory stands for its student; any other name for itself."""
    student = Path(name) / "student"
    return str(student) if _holds_model(student) else name


def stop_ids(tokenizer: Any, module: PreTrainedModel) -> tuple[int, ...]:
    """Every token that ends a response: one set for writing, masks and evaluation."""
    ids = {tokenizer.eos_token_id}
    configured = module.generation_config.eos_token_id if module.generation_config else None
    if configured is not None:
        ids.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(ids))


def context_length(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(
    config: Any, request_tokens: int, response_tokens: int, name: str, front: int = 0
) -> None:
    """Refuse lengths that the model's positions can't hold.

    Raises:
        UserError: if front + request + response exceed the context.
    """
    context = context_length(config)
    needed = front + request_tokens + response_tokens
    if context is not None and needed > context:
        prompt = f"{front} soft-prompt vectors + " if front else ""
        raise UserError(
            f"{prompt}max_request_tokens {request_tokens} + max_response_tokens {response_tokens} "
            f"= {needed} positions, but the context of {name} has {context}. Lower one of them."
        )


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself (emulation is 10 times slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def embedding_rows(module: PreTrainedModel) -> int:
    """How many token ids the model can read; at least as many as its tokenizer has."""
    table: Any = module.get_input_embeddings()
    return table.weight.shape[0]


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _holds_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _location(name: str) -> dict[str, Any]:
    name = model_directory(name)
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"Model file {name} does not exist.")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if (path.exists() or looks_local) and not _holds_model(path):
        raise UserError(
            f"{name} is not a model: it has no config.json. Name a save_pretrained directory, "
            "a .gguf file, a finished run, or a hub id."
        )
    return {"pretrained_model_name_or_path": os.path.expanduser(name)}


def _no_model(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"{name} is not a model that can be loaded ({reason}). Name a save_pretrained directory, "
        "a .gguf file, a finished run, or a hub id."
    )
