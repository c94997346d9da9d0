"""Loading causal language models and tokenizers, and what their configurations say."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from promptkd import kernels
from promptkd.errors import UserError
from promptkd.models.language_model import LanguageModel, proven


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    attention: str = "auto",
) -> PreTrainedModel:
    """Load a causal language model for evaluation-mode use, with the kernels of its device.

    A saved LoRA is merged into its base.

    Args:
        name: hub id, directory, ``.gguf`` file, or the directory of a finished run (its student).
        dtype: of the weights.
        device: ``default_device`` if not given.
        attention: auto | sdpa | flash | eager.

    Raises:
        UserError: if there is no such model, or it doesn't have that attention here.
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
    kernels.prepare(module, device, attention)
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
        return _load_adapted(name, adapter, dtype)
    with _quietly():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **arguments, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
        except Exception as error:  # whatever another library says of files that others wrote
            raise UserError(_no_model(name, error)) from None
    model, found = loaded
    check_weights(name, model, found)
    _make_savable(name, model)
    if "gguf_file" in arguments:  # a quantised config would be saved with the model otherwise
        config: Any = model.config
        del config.quantization_config
        plain: Any = type(model)(config)
        plain.to(dtype)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        model = plain
    return model


def _load_adapted(name: str, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A LoRA merged into its base; tokens that were added with it get their rows first."""
    config = adapter_config(directory)
    base = config.base_model_name_or_path
    if config.peft_type != peft.PeftType.LORA:
        kind = str(config.peft_type).rpartition(".")[2]
        raise UserError(
            f"{name} is an adapter of the kind {kind}, which can't be merged "
            "into a model. Name a LoRA, or a whole model."
        )
    if not base:
        raise UserError(
            f"{name} is a LoRA whose adapter_config.json names no base model. Write the base into "
            "base_model_name_or_path there, or merge the adapter and name the whole model."
        )
    model: Any = _load(base, dtype)
    if (directory / "tokenizer_config.json").is_file():
        num_tokens = len(load_tokenizer(name))
        if num_tokens > embedding_rows(model):
            model.resize_token_embeddings(num_tokens)
    with _quietly():
        try:
            whole = peft.PeftModel.from_pretrained(model, str(directory))
        except Exception as error:
            raise UserError(_no_model(name, error)) from None
    return whole.merge_and_unload()


def adapter_config(directory: Path) -> Any:
    """What adapter_config.json says.

    Raises:
        UserError: if it is damaged, or names the adapter itself as its base.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # of every kind, as the file may be damaged in any way
        raise UserError(f"{directory}: its adapter_config.json can't be read: {error}.") from None
    base = config.base_model_name_or_path
    if base and Path(base).resolve() == directory.resolve():
        raise UserError(f"{directory} is an adapter that names itself as its base. Mend it there.")
    return config


def check_weights(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse a model some of whose numbers aren't the checkpoint's, or no numbers at all.

    Args:
        found: what transformers reports of loading: missing, unexpected and mismatched keys.

    Raises:
        UserError: with how many weights are concerned, and the first of them.
    """
    other = ("vision", "visual", "image", "audio", "multi_modal", "multimodal", "mtp")
    unexpected = [
        key for key in sorted(found["unexpected_keys"]) if not any(word in key for word in other)
    ]
    missing = sorted(found["missing_keys"])
    prefixed = any(key.startswith(("_orig_mod.", "module.")) for key in unexpected)
    hint = " Its names carry a wrapper's prefix (_orig_mod. or module.): strip it."
    for what, keys in (
        ("are missing from the checkpoint, and would be random", missing),
        ("stand in the checkpoint, but the model has no place for them", unexpected),
    ):
        if keys:
            raise UserError(
                f"{name}: {len(keys)} weights of {type(model).__name__} {what} "
                f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})."
                f"{hint if prefixed else ''} Save the whole model again."
            )
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{name}: the weight {key} holds NaN or infinite numbers. It comes from a run "
                "that diverged, or a damaged file: name an earlier checkpoint."
            )


def _make_savable(name: str, model: PreTrainedModel) -> None:
    """Mend a generation config that transformers reads but refuses to save with the student."""
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        reset = {k: v for k, v in sampling.items() if getattr(config, k, None) not in (None, v)}
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError:
            ends = ("bos_token_id", "eos_token_id", "pad_token_id")
            kept = {key: getattr(config, key, None) for key in ends}
            model.generation_config = GenerationConfig(**kept)
            reset = {}
        with_ = f"do_sample: true, since it has {', '.join(reset)}" if reset else "its tokens alone"
        tqdm.write(
            f"{name}: its generation_config.json contradicts itself and couldn't be saved again; "
            f"it goes on with {with_}",
            file=sys.stderr,
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars and tables that transformers prints for every file."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def text_config(name: str) -> Any:
    """The configuration of a model's text part; a LoRA has its base's.

    Raises:
        UserError: if there is no such model.
    """
    arguments = _location(name)
    directory = Path(arguments["pretrained_model_name_or_path"])
    if (directory / "adapter_config.json").is_file():
        base = adapter_config(directory).base_model_name_or_path
        return text_config(base or name)
    try:
        return AutoConfig.from_pretrained(**arguments).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_no_model(name, error)) from None


def dtype_of(name: str) -> torch.dtype:
    """What a model's weights came in; fp32 where nothing says so."""
    if "gguf_file" in _location(name):
        return torch.float32
    dtype = text_config(name).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model name; see ``load_model``. A LoRA without one has its base's.

    Raises:
        UserError: if there is none, or it can't be read, or has no end-of-sequence token.
    """
    arguments = _location(name)
    directory = Path(arguments["pretrained_model_name_or_path"])
    is_adapter = (directory / "adapter_config.json").is_file()
    if is_adapter and not (directory / "tokenizer_config.json").is_file():
        base = adapter_config(directory).base_model_name_or_path
        if base:
            return load_tokenizer(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=False)
    except Exception as error:
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
        given = configured if isinstance(configured, list) else [configured]
        if not all(isinstance(token, int) for token in given):
            raise UserError(
                f"The generation_config.json of {module.name_or_path} has eos_token_id "
                f"{configured!r}, which is no token id. Mend it there."
            )
        ids.update(given)
    return tuple(sorted(ids))


def context_length(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(
    config: Any,
    request_tokens: int,
    response_tokens: int,
    name: str,
    front: int = 0,
    limit: str = "max_request_tokens",
) -> None:
    """Refuse lengths that the model's positions can't hold; ``limit`` is the request's.

    Raises:
        UserError: if front + request + response exceed the context.
    """
    context = context_length(config)
    needed = front + request_tokens + response_tokens
    if context is not None and needed > context:
        prompt = f"{front} soft-prompt vectors + " if front else ""
        raise UserError(
            f"{prompt}{limit} {request_tokens} + max_response_tokens {response_tokens} "
            f"= {needed} positions, but the context of {name} has {context}. Lower one of them.",
            "PK201",
        )


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself (emulation is 10 times slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"The precision is '{precision}'; known: auto, bf16, fp32.")
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def embedding_rows(module: PreTrainedModel) -> int:
    """How many token ids the model can read; at least as many as its tokenizer has."""
    table: Any = module.get_input_embeddings()
    return table.weight.shape[0]


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_in_memory(module: nn.Module) -> int:
    """Of its weights and buffers as they are loaded; what two layers share counts once."""
    held = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())


def bytes_on_disk(name: str) -> int:
    """Of the files that hold a model's weights; a LoRA's base counts with it."""
    arguments = _location(name)
    place = Path(arguments["pretrained_model_name_or_path"])
    if "gguf_file" in arguments:
        return (place / arguments["gguf_file"]).stat().st_size
    if not place.is_dir():  # a hub id, in the cache that it was loaded from
        place = Path(str(cached_file(str(place), "config.json"))).parent
    files = [*place.glob("*.safetensors")] or [*place.glob("*.bin")]
    base = None
    if (place / "adapter_config.json").is_file():
        base = peft.PeftConfig.from_pretrained(str(place)).base_model_name_or_path
    return sum(file.stat().st_size for file in files) + (bytes_on_disk(base) if base else 0)


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
    said = str(error).strip().splitlines()
    reason = said[0] if said else type(error).__name__
    if isinstance(error, KeyError | AttributeError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return (
        f"{name} is not a model that can be loaded ({reason}). Name a save_pretrained directory, "
        "a .gguf file, a finished run, or a hub id."
    )
