"""The device, the shapes and the clock of the sections of gpu.py."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from promptkd import kernels
from promptkd.models.language_model import LanguageModel, proven

TINY = "--tiny" in sys.argv
DEVICE = torch.device("cpu" if TINY or not torch.cuda.is_available() else "cuda")
BF16 = torch.bfloat16

QWEN = {
    "1.5B": (151936, 1536, 8960, 12, 2, 28, True),
    "7B": (152064, 3584, 18944, 28, 4, 28, False),
}
LLAMA = {
    "135M": (49152, 576, 1536, 9, 3, 30, True),
    "10 layers": (49152, 576, 1536, 9, 3, 10, True),
}
SMALLEST = (640, 64, 128, 4, 2, 2, True)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Mean of a few, after one that warms up."""
    work()
    synchronize()
    started = time.perf_counter()
    for _ in range(1 if TINY else repeats):
        work()
    synchronize()
    return (time.perf_counter() - started) / (1 if TINY else repeats)


def module(name: str, dtype: torch.dtype) -> Any:
    kind = Qwen2Config if name in QWEN else LlamaConfig
    known = QWEN | LLAMA
    vocabulary, width, inner, heads, keys, layers, tied = SMALLEST if TINY else known[name]
    config = kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        num_hidden_layers=layers,
        tie_word_embeddings=tied,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def language_model(
    name: str, dtype: torch.dtype = BF16, learns: bool = False, compiled: bool = False
) -> LanguageModel:
    whole = module(name, dtype).requires_grad_(learns)
    kernels.prepare(whole, DEVICE, compiled=compiled)
    return proven(LanguageModel(whole, whole.config.vocab_size, BF16), name)
