"""How a run was started: on how many processes, where, and with what it is asked."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from promptkd.data import Encoder
from promptkd.errors import UserError
from promptkd.ranks import Ranks, meet

SHARDERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def refuse_unknown_launch() -> None:
    """Settings of accelerate's launcher that would be ignored.

    Raises:
        UserError: naming one.
    """
    for variable, name in SHARDERS.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"The launcher asks for {name}, which promptkd doesn't follow. Launch without it: "
                "torchrun --nproc_per_node N -m promptkd ..., with sharding: fsdp in the recipe if "
                "the processes shall share the models out."
            )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        raise UserError(
            f"The launcher asks for mixed precision {asked}, which promptkd doesn't follow. Set it "
            "in the recipe (precision: bf16) and launch with --mixed_precision no."
        )
    several = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if several and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes on CPUs and started one. Use "
            "torchrun --nproc_per_node N -m promptkd ... instead."
        )


def describe(
    encoder: Encoder, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """The first line of a run, and part of its record."""
    gpu = device.type == "cuda"
    return {
        "ranks": ranks.number,
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "template": encoder.template,
        "max_request_tokens": encoder.max_request_tokens,
        "max_response_tokens": encoder.max_response_tokens,
        "date": encoder.date.isoformat(),
    }


def started(trackers: Sequence[str], place: Path) -> Accelerator:
    """This process as its launcher started it, on the CPU where there is no GPU.

    Args:
        trackers: accelerate's names.
        place: a directory for what they write.

    Raises:
        UserError: if other processes of the launch don't come.
    """
    meet()
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        project_dir=str(place),
    )
