"""Tiny studies: two methods, two seeds, three steps each."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
import tiny
from promptkd.cli import main


def save_models_and_data(directory: Path) -> Path:
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl", 6)
    tiny.write_data(directory / "held_out.jsonl", 5)
    tiny.write_data(directory / "other.jsonl", 2)
    return directory


def raw_study(pair: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Two methods with two seeds, three steps each, scored on two data sets."""
    steps = {"max_steps": 3, "learning_rate": 5e-2}
    base = tiny.recipe(pair, data={"max_response_tokens": 12}, optimization=steps)
    del base["method"], base["output"]
    return {
        "base": base,
        "methods": {
            "kd": {"method": {"name": "kd"}},
            "gkd": {"method": {"name": "gkd"}, "optimization": {"learning_rate": 0.1}},
        },
        "seeds": [0, 1],
        "evaluation": {
            "suite": {"held out": f"{pair}/held_out.jsonl", "other": f"{pair}/other.jsonl"},
            "seeds": [10, 20],
            "num_examples": 4,
        },
        "baseline": "kd",
        "output": str(output),
        **changes,
    }


def write(place: Path, raw: dict[str, Any]) -> str:
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


def study(place: Path, raw: dict[str, Any]) -> runs.Outcome:
    """Run the command with a study file in ``place``."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        main(["study", write(place, raw)])
    assert isinstance(end.value.code, int)
    return runs.Outcome(end.value.code, stdout.getvalue(), stderr.getvalue())
