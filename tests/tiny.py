"""Tiny models of every architecture, a character tokenizer, and what a run needs around them."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from promptkd import kernels
from promptkd.models.language_model import LanguageModel, proven

EOS, PAD = 0, 1
WIDTH, CONTEXT, ROWS = 32, 512, 104
ARCHITECTURES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma2", "mistral")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(chat_template: bool = False) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline; <eos> is 0, <pad> is 1."""
    tokens = ["<eos>", "<pad>", *map(chr, range(32, 127)), "\n"]
    whole = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=" "))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    whole.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>", pad_token="<pad>")
    if chat_template:
        made.chat_template = CHAT_TEMPLATE
    return made


def model(
    architecture: str,
    num_layers: int = 2,
    rows: int = ROWS,
    seed: int = 0,
    width: int = WIDTH,
    **config: Any,
) -> PreTrainedModel:
    """Random weights in evaluation mode, large enough for the outputs to depend on the text."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(
        _config(architecture, num_layers, rows, width, config), dtype=torch.float32
    )
    return randomise(made, seed).eval()


def randomise(module: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough for the outputs to depend on the text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.05 * noise)
    return module


def language_model(
    module: PreTrainedModel, vocabulary: int = ROWS, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """As the loader makes it: with the CPU's kernels, and packing where it is proven."""
    kernels.prepare(module, torch.device("cpu"))
    return proven(LanguageModel(module, vocabulary, dtype), "the tiny model")


def save_pair(
    directory: Path,
    student: str = "llama",
    teacher: str | None = None,
    student_options: dict[str, Any] | None = None,
    teacher_options: dict[str, Any] | None = None,
    chat_template: bool = False,
) -> tuple[Path, Path]:
    """Save a student and a deeper teacher with one tokenizer: directory/student, /teacher."""
    made = (
        model(student, **{"seed": 1, **(student_options or {})}),
        model(teacher or student, **{"seed": 2, "num_layers": 3, **(teacher_options or {})}),
    )
    paths = directory / "student", directory / "teacher"
    for module, path in zip(made, paths, strict=True):
        module.save_pretrained(path)
        tokenizer(chat_template).save_pretrained(path)
    return paths


def write_data(path: Path, num_rows: int = 12, with_output: bool = True) -> Path:
    """JSON lines with instructions and outputs of different lengths."""
    rows: list[dict[str, str]] = [
        {"instruction": f"say {i}" + "?" * (i % 5)} for i in range(num_rows)
    ]
    if with_output:
        for i, row in enumerate(rows):
            row["output"] = f"it is {i}!" * (i % 4 + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(directory: Path, **overrides: Any) -> dict[str, Any]:
    """A raw recipe for the pair and the data in ``directory``; overrides are merged by section.

    ``recipe(d, method={"name": "kd"}, optimization={"max_steps": 2}, output=...)``; the method
    section is replaced, not merged, because its options belong to one method.
    """
    raw: dict[str, Any] = {
        "student": {"model": str(directory / "student")},
        "teacher": {"model": str(directory / "teacher")},
        "method": {"name": "promptkd"},
        "data": {
            "train": str(directory / "train.jsonl"),
            "template": "none",
            "max_request_tokens": 24,
            "max_response_tokens": 24,
        },
        "optimization": {
            "learning_rate": 1e-2,
            "teacher_learning_rate": 1e-2,
            "global_batch_size": 4,
            "micro_batch_tokens": 128,
            "max_steps": 3,
        },
        "precision": "fp32",
        "output": str(directory / "run"),
    }
    raw = copy.deepcopy(raw)
    for key, value in overrides.items():
        if key != "method" and isinstance(value, dict) and isinstance(raw.get(key), dict):
            raw[key] |= value
        else:
            raw[key] = value
    return raw


def _config(
    architecture: str, num_layers: int, rows: int, width: int, extra: dict[str, Any]
) -> Any:
    common: dict[str, Any] = {
        "vocab_size": rows,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "bos_token_id": None,
    }
    modern = {
        "hidden_size": width,
        "intermediate_size": 3 * width // 2,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    head = {"head_dim": width // 4}
    match architecture:
        case "gpt2":
            made = {"n_embd": width, "n_layer": num_layers, "n_head": 4, "n_positions": CONTEXT}
            return GPT2Config(**common | made | extra)
        case "opt":
            made = {
                "hidden_size": width,
                "word_embed_proj_dim": width,
                "ffn_dim": 2 * width,
                "num_hidden_layers": num_layers,
                "num_attention_heads": 4,
                "max_position_embeddings": CONTEXT,
            }
            return OPTConfig(**common | made | extra)
        case "llama":
            return LlamaConfig(**common | modern | extra)
        case "qwen2":
            return Qwen2Config(**common | modern | extra)
        case "qwen3":
            return Qwen3Config(**common | modern | head | extra)
        case "gemma2":
            soft = {
                "final_logit_softcapping": 5.0,
                "attn_logit_softcapping": 20.0,
                "query_pre_attn_scalar": width // 4,
                "sliding_window": 64,
            }
            return Gemma2Config(**common | modern | head | soft | extra)
        case "mistral":
            return MistralConfig(**common | modern | {"sliding_window": None} | extra)
    raise ValueError(f"no tiny {architecture}; there are {', '.join(ARCHITECTURES)}")
