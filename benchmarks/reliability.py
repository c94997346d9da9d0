"""What a run promises when things go wrong, tried many times (docs/reliability.md).

    python benchmarks/reliability.py                    # all of it
    python benchmarks/reliability.py "kill -9" damage   # some of it

Tiny models from tests/. Every run is a process of its own, forked from this one so that it starts
at once, and is compared bit for bit with the same run left alone: student, teacher, every line of
metrics.jsonl but its times.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import runs
import tiny
from promptkd.cli import main

METHODS = {
    "promptkd": {"name": "promptkd"},
    "gkd": {"name": "gkd", "student_share": 0.5},
    "minillm (inner epochs)": {"name": "minillm", "inner_epochs": 2},
    "distillm (replay buffer)": {"name": "distillm", "capacity": 8},
    "taid (a teacher on the way)": {"name": "taid"},
}
STEPS, SEED = 8, 0


class Laboratory:
    """Recipes on one tiny pair, and how each of them ends when nothing happens to it."""

    def __init__(self, place: Path):
        self.place = place
        self.number = 0
        tiny.save_pair(place)
        tiny.write_data(place / "train.jsonl", 12)
        tiny.write_data(place / "valid.jsonl", 4)

    @cache  # noqa: B019 - one laboratory per process
    def alone(self, method: str) -> tuple[dict[str, Any], float]:
        """What a run that nobody disturbs ends with, and its seconds."""
        started = time.perf_counter()
        command, output = self.command(method)
        assert ended(start(command)) == 0
        return runs.result(output), time.perf_counter() - started

    def command(self, method: str) -> tuple[list[str], Path]:
        """``promptkd train`` with a fresh output, which is also given."""
        self.number += 1
        output = self.place / f"run-{self.number}"
        raw = tiny.recipe(self.place, method=METHODS[method], output=str(output))
        raw["optimization"] |= {"max_steps": STEPS, "global_batch_size": 4}
        raw["data"] |= {"validation": str(self.place / "valid.jsonl")}
        raw["evaluation"] = {"every_steps": 4, "metric": "cross_entropy"}
        raw["checkpoints"] = {"every_steps": 2, "keep": 2}
        name = f"recipe-{self.number}.yaml"
        return ["train", runs.write_recipe(self.place, raw, name)], output

    def is_as_expected(self, method: str, output: Path) -> bool:
        """Whether student and adapter are, bit for bit; lines that were damaged are lost."""
        found, expected = runs.result(output), self.alone(method)[0]
        return all(found[name] == expected[name] for name in expected if "/" in name)

    def finishes(self, method: str, command: list[str], output: Path) -> bool:
        """Whether the same command ends with what it would have without an interruption."""
        return ended(start(command)) == 0 and runs.result(output) == self.alone(method)[0]


def start(command: list[str], before: Callable[[], Any] = lambda: None) -> int:
    """Type a command in a process of its own; gives its id."""
    process = os.fork()
    if process:
        return process
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    before()
    try:
        main(command)
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    os._exit(99)


def ended(process: int) -> int:
    """The exit code; minus the signal's number for one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def note(found: dict[str, Any]) -> None:
    """What was found so far, for who waits."""
    print(json.dumps(found), file=sys.stderr, flush=True)


def signals(laboratory: Laboratory, number: signal.Signals, per_method: int) -> dict[str, Any]:
    """A signal at a random moment, then the same command until it is done."""
    dice = random.Random(SEED)
    found = {"tried": 0, "interrupted": 0, "equal": 0, "exit codes": {}}
    for _ in range(per_method):
        for method in METHODS:
            seconds = laboratory.alone(method)[1]
            command, output = laboratory.command(method)
            process = start(command)
            time.sleep(dice.uniform(0.1, 1) * seconds)
            os.kill(process, number)  # one that has ended waits to be asked for its exit code
            code = ended(process)
            found["tried"] += 1
            found["interrupted"] += code != 0
            found["exit codes"][str(code)] = found["exit codes"].get(str(code), 0) + 1
            found["equal"] += laboratory.finishes(method, command, output)
            note(found)
    return found


def full_disk(laboratory: Laboratory) -> dict[str, Any]:
    """No file may grow beyond a size, of which ten are tried; then it may."""
    found = {"tried": 0, "one sentence": 0, "equal": 0}
    for size in (100, 1_000, 4_000, 10_000, 20_000, 40_000, 80_000, 120_000, 160_000, 240_000):
        command, output = laboratory.command("promptkd")

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        found["tried"] += 1
        found["one sentence"] += ended(start(command, limit)) in (0, 1)
        found["equal"] += laboratory.finishes("promptkd", command, output)
        note(found)
    return found


def damage(laboratory: Laboratory) -> dict[str, Any]:
    """Each file of an unfinished run, emptied, cut in half and overwritten."""
    found = {"tried": 0, "equal": 0, "refused": 0, "other": []}

    def unfinished() -> tuple[list[str], Path]:
        command, output = laboratory.command("promptkd")
        process = start(command)
        while not (output / "checkpoints" / "step-000006").exists():
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        ended(process)
        return command, output

    def files(output: Path) -> list[str]:
        every = (path for path in output.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(output)) for path in every if path.name != ".lock")

    for name in files(unfinished()[1]):
        for how in (lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\xff" * len(b)):
            command, output = unfinished()
            path = output / name
            if not path.is_file():  # a kill comes at its own time
                continue
            path.write_bytes(how(path.read_bytes()))
            code = ended(start(command))
            found["tried"] += 1
            if code == 0 and laboratory.is_as_expected("promptkd", output):
                found["equal"] += 1
            elif code == 1:
                found["refused"] += 1
            else:
                found["other"].append(f"{name}: exit {code}")
            note(found)
    return found


def two_processes(laboratory: Laboratory) -> dict[str, Any]:
    """Two commands on one output at once."""
    found = {"tried": 0, "one trained": 0, "equal": 0}
    for _ in range(10):
        command, output = laboratory.command("promptkd")
        codes = sorted(ended(process) for process in (start(command), start(command)))
        found["tried"] += 1
        found["one trained"] += codes == [0, 1]
        found["equal"] += laboratory.finishes("promptkd", command, output)
        note(found)
    return found


TRIALS: dict[str, Callable[[Laboratory], dict[str, Any]]] = {
    "kill -9": lambda laboratory: signals(laboratory, signal.SIGKILL, per_method=8),
    "SIGTERM": lambda laboratory: signals(laboratory, signal.SIGTERM, per_method=2),
    "full disk": full_disk,
    "two processes": two_processes,
    "damage": damage,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        laboratory = Laboratory(Path(place))
        for name in sys.argv[1:] or TRIALS:
            print(json.dumps({name: TRIALS[name](laboratory)}), flush=True)
