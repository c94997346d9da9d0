"""Options of vLLM that a recipe may set, and what it is given otherwise. No torch, no vLLM."""

from typing import Any

SHARE = 0.3
"""Of a GPU's memory, for vLLM's weights and cache; training needs the rest."""
SET_BY_THE_RUN = (
    "async_scheduling",
    "distributed_executor_backend",
    "dtype",
    "generation_config",
    "load_format",
    "logits_processors",
    "max_model_len",
    "model",
    "skip_tokenizer_init",
    "tokenizer",
)


def share(options: dict[str, Any]) -> float:
    """Of a GPU's memory."""
    return options.get("gpu_memory_utilization", SHARE)


def sleeps(options: dict[str, Any]) -> bool:
    """Whether vLLM gives its memory back while the models learn."""
    return bool(options.get("enable_sleep_mode"))


def check(engine: str, options: dict[str, Any]) -> None:
    """Refuse options that nobody reads, that a run sets itself, or that it can't follow.

    Raises:
        ValueError: naming the option.
    """
    if options and engine == "transformers":
        raise ValueError(f"vllm has options, but the engine is {engine}: set engine: vllm")
    if ours := sorted(options.keys() & {*SET_BY_THE_RUN}):
        raise ValueError(f"vllm.{ours[0]} is set by the run itself: leave it out")
    for key, number in options.items():
        if key.endswith("_parallel_size") and number != 1:
            raise ValueError(
                f"vllm.{key} is {number!r}: every process has an engine of its own on its own "
                "GPU, where the student must fit; leave it out, and start one process per GPU"
            )
    given = share(options)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1:
        raise ValueError(f"vllm.gpu_memory_utilization is {given!r}: it lies between 0 and 1")
