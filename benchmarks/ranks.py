"""Two processes of one thread against one, replicas and sharded: whole steps, in turns.

The same recipe and batch on one process, on two replicas, and on two that share both models, whose
layers are gathered for each pass or once a step; also half the batch on one, so that rows per
process are equal (weak scaling). What the time model says of the same runs stands beside: its
products at this core's own speed, its talk at the speed that two processes measure here. At most
seven minutes. Writes results/ranks.*.json; ``--tiny`` rehearses.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed
from on_ranks import OnRanks, Pair, recipe
from setting import PRECISION, matmul_peak, record

from promptkd.config import load_recipe
from promptkd.methods import build_method

PAIR = Pair(student=10, teacher=30, width=576)
"""As SmolLM2-135M and its student of ten layers."""
SMALL = Pair(student=1, teacher=2, width=192)
BATCH, MICRO_BATCH_TOKENS = 16, 1024
REPEATS = 3
LIMIT = 330
"""Seconds after which no further turn begins, the first aside."""
FSDP = {"sharding": "fsdp"}
SIDES: dict[str, tuple[int, int, dict[str, str]]] = {
    "one": (1, BATCH, {}),
    "one, half the batch": (1, BATCH // 2, {}),
    "two replicas": (2, BATCH, {}),
    "two, sharded": (2, BATCH, FSDP),
    "two, sharded, gathered for a step": (2, BATCH, FSDP | {"gathered_for": "step"}),
}
"""Processes, requests of a step, and other keys of the recipe."""
PHASES = ("seconds_generation", "seconds_learning", "seconds_student", "seconds_teacher")


def of_rank(path: Path) -> None:
    """Take a step for each line: its seconds; for "talk", the bytes that an all-reduce moves."""
    from promptkd.kernels.allocator import keep_freed_memory
    from promptkd.training.trainer import Trainer

    keep_freed_memory()  # as every command does
    torch.set_num_threads(1)
    given = load_recipe(path)
    trainer = Trainer(given, build_method(given.method.name))
    request = statistics.mean(len(e.request_ids) for e in trainer.parts.requests.data.examples)
    for line in sys.stdin:
        if line.strip() == "talk":
            print(json.dumps(talk()), flush=True)
            continue
        started = time.perf_counter()
        row = trainer.take_step(int(line))
        seconds = {"whole": time.perf_counter() - started} | {name: row[name] for name in PHASES}
        lengths = {"request": request, "response": row["response_length"]}
        print(json.dumps(seconds | lengths), flush=True)


def talk(size: int = 16_000_000) -> dict[str, float]:
    """Bytes per second that a process sends in sums over all, and the seconds of a small one."""
    seconds = {}
    for number in (1, size):
        tensor = torch.zeros(number)
        for _ in range(2):
            started = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            seconds[number] = time.perf_counter() - started
    return {"link": 4 * size / seconds[size], "latency": seconds[1]}


def modelled(given: Path, ranks: int, measured: dict[str, float]) -> dict[str, float]:
    """Seconds of a step by the equations, by phase."""
    from promptkd.training.planned import Cluster, plan_of
    from promptkd.training.sizing import EPYC, step_seconds

    read = load_recipe(given)
    plan = plan_of(read, build_method(read.method.name), Cluster(ranks, 1000.0, device="cpu"))
    plan = replace(plan, request=measured["request"], response=measured["response"])
    machine = replace(
        EPYC,
        flops=measured["flops"],
        bandwidth=EPYC.bandwidth * measured["flops"] / EPYC.flops,
        link=measured["link"],
        latency=measured["latency"],
        per_machine=ranks,
    )
    return step_seconds(plan, machine)


def main(pair: Pair, repeats: int) -> None:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        groups: dict[str, OnRanks] = {}
        for name, (number, batch, other) in SIDES.items():
            sizes = {"global_batch_size": batch, "micro_batch_tokens": MICRO_BATCH_TOKENS}
            given = recipe(pair, place / name / "run", **sizes) | other
            groups[name] = OnRanks(__file__, given, number, place=place / name)
        for group in groups.values():  # load, and take the first step
            group.ask("0")
        talked = groups["two replicas"].ask("talk")[0]
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
        for number in range(1, repeats + 1):
            for name, group in groups.items():
                if number == 1 or time.perf_counter() - begun < LIMIT:
                    answers = group.ask(str(number))
                    turns[name].append({key: max(a[key] for a in answers) for key in answers[0]})
                    print(name, turns[name][-1], flush=True)
        for group in groups.values():
            group.end()
        seconds = {
            name: {key: statistics.median(turn[key] for turn in own) for key in own[0]}
            for name, own in turns.items()
        }
        lengths = {key: seconds["one"][key] for key in ("request", "response")}
        known = talked | lengths | {"flops": matmul_peak()}
        said = {
            name: modelled(place / name / "recipe.yaml", number, known)
            for name, (number, *_) in SIDES.items()
        }
    whole = {name: own["whole"] for name, own in seconds.items()}
    of_model = {name: sum(own.values()) for name, own in said.items()}
    row = {
        "times_faster": {name: whole["one"] / whole[name] for name in SIDES},
        "times_faster_by_model": {name: of_model["one"] / of_model[name] for name in SIDES},
        "weak_scaling": whole["one, half the batch"] / whole["two replicas"],
        "weak_scaling_by_model": of_model["one, half the batch"] / of_model["two replicas"],
        "seconds": seconds,
        "seconds_by_model": said,
        "machine_of_model": known,
    }
    if pair == SMALL:
        print(json.dumps(row), PRECISION)
    else:
        record("ranks", row)


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--tiny"]):
        main(*((SMALL, 1) if sys.argv[1:] else (PAIR, REPEATS)))
    else:
        of_rank(Path(sys.argv[1]))
