"""Memory of each of two processes that share both models, against what the equations say.

Per process, beyond what it holds before it loads anything: the most while models are loaded and
shared out, what stays, and the most in the second of two steps. The equations are those of
``promptkd check --gpus``, for this kind of machine: written beside the first of the runs, the
others are forecast by them. Writes results/sharded_memory.*.json; with a number, takes the run of
that number alone and writes nothing.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import forget_peak, resident
from on_ranks import OnRanks, Pair, recipe
from setting import record

PAIR = Pair(student=8, teacher=24, width=1152)
OTHER = Pair(student=6, teacher=12, width=768)
"""Of its student's weights half are embeddings; of the first's a third."""
LORA = {"r": 8, "alpha": 16}
RUNS: dict[str, tuple[Pair, dict[str, Any]]] = {
    "promptkd": (PAIR, {}),
    "promptkd, another pair": (OTHER, {}),
    "gkd, another pair": (OTHER, {"method": {"name": "gkd"}}),
    "a LoRA student, another pair": (OTHER, {"student": {"lora": LORA}}),
}
SMALL = Pair(student=1, teacher=2, width=192)
RANKS = 2
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc gives freed memory back: else what it keeps for later (1 GB here) is counted too."""
STEP = {"global_batch_size": 2, "micro_batch_tokens": 128}


def of_rank(path: Path) -> None:
    import promptkd.training.model_card  # noqa: F401  what a run imports late
    from promptkd.config import load_recipe
    from promptkd.methods import build_method
    from promptkd.models.sizes import num_parameters
    from promptkd.training.trainer import Trainer

    given = load_recipe(path)
    method = build_method(given.method.name)
    sys.stdin.readline()
    gc.collect()
    before = resident("VmRSS")
    forget_peak()
    trainer = Trainer(given, method)
    loading = resident("VmHWM") - before
    gc.collect()
    standing = resident("VmRSS") - before
    trainer.take_step(0)
    forget_peak()
    trainer.take_step(1)
    row = {
        "loading": loading,
        "standing": standing,
        "step": resident("VmHWM") - before,
        "student_parameters": num_parameters(trainer.parts.models.student.module),
    }
    print(json.dumps(row), flush=True)


def forecast(path: Path) -> dict[str, float]:
    from promptkd.config import load_recipe
    from promptkd.methods import build_method
    from promptkd.training.planned import Cluster, plan_of
    from promptkd.training.sizing import peak_bytes

    given = load_recipe(path)
    plan = plan_of(given, build_method(given.method.name), Cluster(RANKS, 1000.0, device="cpu"))
    return peak_bytes(plan, STEP["micro_batch_tokens"])


def measured(pair: Pair, changes: dict[str, Any]) -> dict[str, Any]:
    """One run's bytes, and the largest as a share of the computed."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        given = recipe(pair, place / "run", 16, **STEP) | {"sharding": "fsdp"}
        for section, change in changes.items():
            given[section] = given[section] | change
        processes = OnRanks(__file__, given, RANKS, place=place, environment=AT_ONCE)
        ranks = processes.ask("begin")
        processes.end()
        computed = forecast(place / "recipe.yaml")
    worst = max(row["step"] for row in ranks)
    return {"bytes": ranks, "computed": computed, "of_computed": worst / sum(computed.values())}


def main(arguments: list[str]) -> None:
    if arguments == ["--tiny"]:
        print(json.dumps(measured(SMALL, {})))
    elif arguments:
        print(json.dumps(measured(*list(RUNS.values())[int(arguments[0])])))
    else:
        first, *others = (measured(*run) for run in RUNS.values())
        record("sharded_memory", first | {"others": dict(zip([*RUNS][1:], others, strict=True))})


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_file():
        of_rank(Path(sys.argv[1]))
    else:
        main(sys.argv[1:])
