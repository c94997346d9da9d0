"""What a model weighs and how fast it generates: measured alike, on the same few requests."""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.models.language_model import LanguageModel
from promptkd.models.sizes import bytes_in_memory, bytes_on_disk, num_parameters
from promptkd.rollouts import Tokens

TIMED_REQUESTS, TIMED_TOKENS, REPEATS = 16, 32, 3


def size_and_speed(
    name: str,
    model: LanguageModel,
    requests: Sequence[Tokens],
    decoding: GenerationSettings,
    engines: Mapping[str, Engine],
) -> dict[str, Any]:
    """Parameters, bytes, and tokens generated a second, by transformers and by each engine there.

    Nothing ends a timed response, so all are equally long and models can be compared.

    Args:
        name: what the model was loaded from.
        model: loaded.
        requests: the first ``TIMED_REQUESTS`` of them are answered, at once.
        decoding: no more tokens are generated than it allows.
        engines: what answers for the model here, by name.

    Returns:
        ``parameters``; ``bytes_memory`` of the loaded weights, ``bytes_disk`` of their files;
        ``tokens_per_second``, the best of ``REPEATS`` times, and how it was taken:
        ``timed_requests``, ``timed_tokens`` each, ``engine`` and ``device``. What another engine
        takes stands under ``NAME_tokens_per_second``, its weights already in place.
    """
    timed = list(requests[:TIMED_REQUESTS])
    settings = GenerationSettings(min(TIMED_TOKENS, decoding.max_new_tokens), temperature=0.0)
    all_engines = {"transformers": TransformersEngine(model, ())} | dict(engines)
    rates = {
        engine: _tokens_per_second(_endless(answers), timed, settings)
        for engine, answers in all_engines.items()
    }
    on_gpu = model.device.type == "cuda"
    return {
        "parameters": num_parameters(model.module),
        "bytes_memory": bytes_in_memory(model.module),
        "bytes_disk": bytes_on_disk(name),
        "tokens_per_second": rates.pop("transformers"),
        **{f"{engine}_tokens_per_second": rate for engine, rate in rates.items()},
        "timed_requests": len(timed),
        "timed_tokens": settings.max_new_tokens,
        "engine": "transformers",
        "device": torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
    }


def _endless(engine: Engine) -> Engine:
    """The same, whose responses are all as long as they may be."""
    endless: Any = copy.copy(engine)
    endless.stop_ids = engine.stop_ids[:0]
    return endless


def _tokens_per_second(
    engine: Engine, requests: list[Tokens], settings: GenerationSettings
) -> float:
    """The best of ``REPEATS`` times."""
    seeds = [(0, place) for place in range(len(requests))]
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        engine.generate(requests, seeds, settings)
        seconds.append(time.perf_counter() - started)
    return len(requests) * settings.max_new_tokens / min(seconds)
