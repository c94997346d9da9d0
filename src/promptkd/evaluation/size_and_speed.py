"""What a model weighs and how fast it generates: measured alike, on the same few requests."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import bytes_in_memory, bytes_on_disk, num_parameters
from promptkd.rollouts import Tokens

TIMED_REQUESTS, TIMED_TOKENS, REPEATS = 16, 32, 3


def size_and_speed(
    name: str, model: LanguageModel, requests: Sequence[Tokens], decoding: GenerationSettings
) -> dict[str, Any]:
    """Parameters, bytes, and tokens generated a second.

    Nothing ends a timed response, so all are equally long and models can be compared.

    Args:
        name: what the model was loaded from.
        model: loaded.
        requests: the first ``TIMED_REQUESTS`` of them are answered, at once.
        decoding: no more tokens are generated than it allows.

    Returns:
        ``parameters``; ``bytes_memory`` of the loaded weights, ``bytes_disk`` of their files;
        ``tokens_per_second``, the best of ``REPEATS`` times, and how it was taken:
        ``timed_requests``, ``timed_tokens`` each, ``engine`` and ``device``.
    """
    timed = list(requests[:TIMED_REQUESTS])
    settings = GenerationSettings(min(TIMED_TOKENS, decoding.max_new_tokens), temperature=0.0)
    engine = TransformersEngine(model, ())
    seconds = min(_seconds(engine, timed, settings) for _ in range(REPEATS))
    on_gpu = model.device.type == "cuda"
    return {
        "parameters": num_parameters(model.module),
        "bytes_memory": bytes_in_memory(model.module),
        "bytes_disk": bytes_on_disk(name),
        "tokens_per_second": len(timed) * settings.max_new_tokens / seconds,
        "timed_requests": len(timed),
        "timed_tokens": settings.max_new_tokens,
        "engine": "transformers",
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
    }


def _seconds(
    engine: TransformersEngine, requests: list[Tokens], settings: GenerationSettings
) -> float:
    started = time.perf_counter()
    engine.generate(requests, [(0, place) for place in range(len(requests))], settings)
    return time.perf_counter() - started
