"""What `promptkd check` says of a run before anything runs, against what the run then takes.

Three recipes, each in a process of its own: check, then train. Seconds are those of the whole run,
loading included; memory is the most that the process held. Ratios are taken / forecast: on a
machine that does other things beside, repeat. Writes results/forecast.*.json.

    python benchmarks/forecast.py [METHOD ...]
"""

import json
import shutil
import subprocess
import sys
import time
from importlib import resources
from typing import Any

from setting import MODELS, PRECISION, record, setting

STARTER = resources.files("promptkd") / "starter"
RECIPES: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 10, "global_batch_size": 8},
    "gkd": {"max_steps": 8, "global_batch_size": 8},
    "promptkd": {"max_steps": 8, "global_batch_size": 8},
}


def recipe(method: str) -> dict[str, Any]:
    steps = RECIPES[method]["max_steps"]
    return {
        "student": {"model": str(MODELS / "student-10-even")},
        "teacher": {"model": str(MODELS / "teacher")},
        "method": {"name": method},
        "data": {
            "train": str(STARTER / "train.jsonl"),
            "validation": str(STARTER / "validation.jsonl"),
            "max_request_tokens": 128,
            "max_response_tokens": 64,
        },
        "optimization": {"learning_rate": 1e-4, "teacher_learning_rate": 1e-3, **RECIPES[method]},
        "evaluation": {"every_steps": 0, "num_examples": 16},
        "checkpoints": {"every_steps": steps},
        "output": str(MODELS / f"forecast-{method}"),
    }


def rehearsed(method: str) -> dict[str, float]:
    from promptkd.api import check

    found = check(recipe(method))
    return {"seconds": found["forecast"]["seconds"], "bytes": found["peak_memory"]}


def taken(method: str) -> dict[str, float]:
    from promptkd.api import train

    started = time.perf_counter()
    run = train(recipe(method))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": max(row.get("peak_memory", 0) for row in run.metrics)}


SIDES = {"forecast": rehearsed, "taken": taken}


def in_a_process(method: str, side: str) -> dict[str, float]:
    """With what the whole process took, from its start, as ``seconds_whole``."""
    started = time.perf_counter()
    command = [sys.executable, __file__, method, side]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    row = json.loads(result.stdout.splitlines()[-1])
    return row | {"seconds_whole": round(time.perf_counter() - started, 1)}


def main(methods: list[str]) -> None:
    setting()  # writes both models where there are none
    rows = {}
    for method in methods:
        shutil.rmtree(recipe(method)["output"], ignore_errors=True)
        forecast, took = (in_a_process(method, side) for side in SIDES)
        ratios = {key: round(took[key] / forecast[key], 3) for key in ("seconds", "bytes")}
        rows[method] = {"forecast": forecast, "taken": took, "of_forecast": ratios}
        print(method, PRECISION, rows[method], flush=True)
    record("forecast", rows)


if __name__ == "__main__":
    if sys.argv[2:] and sys.argv[2] in SIDES:
        print(json.dumps(SIDES[sys.argv[2]](sys.argv[1])))
    else:
        main(sys.argv[1:] or [*RECIPES])
