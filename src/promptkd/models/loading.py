"""Loading causal language models and tokenizers, and what their configurations say."""

import copy
import hashlib
import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from promptkd import kernels
from promptkd.errors import UserError
from promptkd.given import GivenModel, refuse_lost
from promptkd.models import damage
from promptkd.models.frozen import WHOLE, Storage
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.objects import copied
from promptkd.models.quiet import quietly
from promptkd.models.soundness import check_weights, make_savable


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    attention: str = "auto",
    storage: Storage = WHOLE,
    compiled: bool = False,
) -> PreTrainedModel:
    """Load a causal language model for evaluation-mode use, with the kernels of its device.

    A saved LoRA is merged into its base.

    Args:
        name: hub id, directory, ``.gguf`` file, or the directory of a finished run (its student).
        dtype: of the weights.
        device: ``default_device`` if not given.
        attention: auto | sdpa | flash | eager.
        storage: how the weights are held, of a model that isn't to learn.
        compiled: whether its layers are compiled for passes without a cache.

    Raises:
        UserError: if there is no such model, it doesn't have that attention here, or this machine
            can't hold or compile it so.
    """
    device = device or default_device()
    storage.refuse_missing(device)
    module: Any = _load(name, dtype, storage.loading(dtype, device)).eval()
    if "past_key_values" not in signature(module.base_model.forward).parameters:
        raise UserError(
            f"{name} ({type(module).__name__}) keeps what it has read in a form of its own instead "
            "of transformers' cache, so promptkd can't generate with it. Choose a model with "
            "attention, alone or beside recurrent layers."
        )
    storage.apply(module, name)
    module.to(device)
    kernels.prepare(module, device, attention, compiled)
    return module


def load_language_model(
    name: str,
    precision: str,
    *,
    vocabulary: int | None = None,
    device: torch.device | None = None,
    storage: Storage = WHOLE,
) -> LanguageModel:
    """A frozen model to generate and measure with, over the first ``vocabulary`` token ids or all.

    Raises:
        UserError: if there is no such model, or its architecture isn't understood.
    """
    device = device or default_device()
    dtype = compute_dtype(precision, device)
    module = load_model(name, dtype, device, storage=storage).requires_grad_(False)
    return proven(LanguageModel(module, vocabulary or embedding_rows(module), dtype), name)


def _load(
    name: str, dtype: torch.dtype, quantized: Mapping[str, Any] = MappingProxyType({})
) -> PreTrainedModel:
    if isinstance(name, GivenModel):
        if quantized:
            raise UserError(
                "teacher.quantization reads a model from its files, and the teacher came as an "
                "object. Name its directory, or give it quantised."
            )
        given = copied(name, dtype)
        check_weights(name, given, {"missing_keys": (), "unexpected_keys": ()})
        make_savable(name, given)
        return given
    arguments = location(name)
    adapter = Path(arguments["pretrained_model_name_or_path"])
    is_adapter = (adapter / "adapter_config.json").is_file()
    if quantized and (is_adapter or "gguf_file" in arguments):
        raise UserError(
            f"teacher.quantization needs a whole model as save_pretrained writes it, and {name} is "
            f"{'a LoRA' if is_adapter else 'a .gguf file'}. Save it whole, or leave the key out."
        )
    if is_adapter:
        return _load_adapted(name, adapter, dtype)
    damage.refuse_damaged_generation_config(adapter)
    with quietly():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **arguments,
                **quantized,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
            )
        except Exception as error:  # whatever another library says of files that others wrote
            raise UserError(_no_model(name, error)) from None
    model, found = loaded
    check_weights(name, model, found)
    make_savable(name, model)
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
    with quietly():
        try:
            whole = peft.PeftModel.from_pretrained(model, str(directory))
        except Exception as error:
            raise UserError(_no_model(name, error)) from None
    damage.refuse_other_base(name, base, whole, directory)
    merged = whole.merge_and_unload().requires_grad_(True)  # PEFT froze the base
    check_weights(name, merged, {"missing_keys": (), "unexpected_keys": ()})
    return merged


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
    if base is not None and not isinstance(base, str):
        raise UserError(
            f"{directory}: its base_model_name_or_path is {base!r}, no name of a model."
        )
    if base and Path(base).resolve() == directory.resolve():
        raise UserError(f"{directory} is an adapter that names itself as its base. Mend it there.")
    return config


def save_model(module: PreTrainedModel, directory: Path) -> None:
    """Write a model as transformers does, without its bars."""
    with quietly():
        module.save_pretrained(directory)


def text_config(name: str) -> Any:
    """The configuration of a model's text part; a LoRA has its base's.

    Raises:
        UserError: if there is no such model.
    """
    if isinstance(name, GivenModel):
        return name.thing.config.get_text_config()
    arguments = location(name)
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
    if isinstance(name, GivenModel):
        return name.thing.dtype
    if "gguf_file" in location(name):
        return torch.float32
    dtype = text_config(name).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model name; see ``load_model``. A LoRA without one has its base's.

    Raises:
        UserError: if there is none, or it can't be read, or has no end-of-sequence token.
    """
    if isinstance(name, GivenModel):
        return _ending(copy.deepcopy(name.tokenizer), name)
    arguments = location(name)
    directory = Path(arguments["pretrained_model_name_or_path"])
    is_adapter = (directory / "adapter_config.json").is_file()
    if is_adapter and not (directory / "tokenizer_config.json").is_file():
        base = adapter_config(directory).base_model_name_or_path
        if base:
            return load_tokenizer(base)
    with quietly():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=False)
        except Exception as error:
            raise UserError(_no_model(name, error)) from None
    return _ending(tokenizer, name)


def _ending(tokenizer: Any, name: str) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {name} has no end-of-sequence token; responses need one."
        )
    return tokenizer


def model_directory(name: str) -> str:
    """A run's directory stands for its student; any other name for itself."""
    student = Path(name) / "student"
    return str(student) if _holds_model(student) else name


def adapter_base(name: str) -> str:
    """What an adapter names its base by: a hub id, or a directory's whole path.

    PEFT looks for the base from where it is called, so a relative path would load from one
    directory only.
    """
    directory = model_directory(name)
    return str(Path(directory).resolve()) if Path(directory).is_dir() else name


def stop_ids(tokenizer: Any, module: PreTrainedModel) -> tuple[int, ...]:
    """Every token that ends a response: one set for writing, masks and evaluation."""
    ids = {tokenizer.eos_token_id}
    configured = module.generation_config.eos_token_id if module.generation_config else None
    if configured is not None:
        given = configured if isinstance(configured, list) else [configured]
        if not all(damage.is_token_id(token, embedding_rows(module)) for token in given):
            raise UserError(
                f"The generation_config.json of {module.name_or_path} has eos_token_id "
                f"{configured!r}, which is no token id of this model. Mend it there."
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


def _holds_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def location(name: str) -> dict[str, Any]:
    refuse_lost(name)
    name = model_directory(os.path.expanduser(name))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"Model file {name} does not exist.")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if (path / "recipe.yaml").is_file() and not _holds_model(path):
        raise UserError(
            f"{name} is a run without a student: let its training finish first, or name a model."
        )
    if (path.exists() or looks_local) and not _holds_model(path):
        raise UserError(
            f"{name} is not a model: it has no config.json. Name a save_pretrained directory, "
            "a .gguf file, a finished run, or a hub id."
        )
    return {"pretrained_model_name_or_path": name}


def digest_of_files(name: str) -> str | None:
    """Of every byte that a model is loaded from, its base's included; None if it isn't here whole.

    Raises:
        UserError: as ``load_model``.
    """
    if isinstance(name, GivenModel):
        return None
    arguments = location(name)
    directory = Path(arguments["pretrained_model_name_or_path"])
    if not directory.is_dir():  # of the hub: the files of one commit
        try:
            config = try_to_load_from_cache(str(directory), "config.json")
        except ValueError:  # no name of the hub: whoever loads says so
            return None
        if not isinstance(config, str):
            return None
        directory = Path(config).parent
    found = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        found.update(f"{path.name} {content} ".encode())
    if (directory / "adapter_config.json").is_file():
        base = adapter_config(directory).base_model_name_or_path
        own = digest_of_files(base) if base else None
        return f"{own} {found.hexdigest()}" if own else None
    return found.hexdigest()


def _no_model(name: str, error: Exception) -> str:
    return (
        f"{name} is not a model that can be loaded ({damage.reason_of(error)}). Name a "
        "save_pretrained directory, a .gguf file, a finished run, or a hub id."
    )
