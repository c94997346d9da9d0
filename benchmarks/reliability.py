"""What a run promises when things go wrong, tried many times (docs/reliability.md).

    python benchmarks/reliability.py                      # all of it
    python benchmarks/reliability.py "kill -9=5" damage   # some of it, the first five times

Tiny models from tests/. Every run is a process of its own, forked from this one, which has imported
everything and computed nothing; it is compared bit for bit with the same run left alone: student,
teacher, every line of metrics.jsonl but its times. Standard error says what was seen so far.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import transformers.models.llama.modeling_llama  # noqa: F401

import promptkd.api
import promptkd.training.model_card  # noqa: F401 - all of these are imported before the fork
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


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code, minus the signal's number if one killed it."""

    code: int
    said: str

    @property
    def in_a_sentence(self) -> bool:
        """Whether it was done, or said why not."""
        told = self.said.splitlines()[-1:] and self.said.splitlines()[-1].startswith("promptkd: ")
        return "Traceback" not in self.said and (self.code == 0 or (self.code == 1 and bool(told)))


class Laboratory:
    """Recipes on one tiny pair, and how each of them ends when nothing happens to it."""

    def __init__(self, place: Path):
        self.place = place
        self.number = 0
        self.words: dict[int, int] = {}
        os.environ["PROMPTKD_CACHE"] = str(place / "cache")
        tiny.save_pair(place)
        tiny.write_data(place / "train.jsonl", 12)
        tiny.write_data(place / "valid.jsonl", 4)

    def start(self, command: list[str], before: Callable[[], Any] = lambda: None) -> int:
        """Type a command in a process of its own; gives its id."""
        heard, said = os.pipe()
        process = os.fork()
        if process:
            os.close(said)
            self.words[process] = heard
            return process
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 99
        try:
            before()
            main(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self, process: int) -> End:
        with open(self.words.pop(process), encoding="utf-8") as words:
            said = words.read()
        return End(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said)

    def do(self, command: list[str], before: Callable[[], Any] = lambda: None) -> End:
        return self.wait(self.start(command, before))

    @cache  # noqa: B019 - one laboratory per process
    def alone(self, method: str) -> tuple[dict[str, Any], float]:
        """What a run that nobody disturbs ends with, and its seconds."""
        started = time.perf_counter()
        command, output = self.command(method)
        end = self.do(command)
        assert end.code == 0, end.said
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

    def finishes(self, method: str, command: list[str], output: Path) -> bool:
        """Whether the same command ends with what it would have without an interruption."""
        return self.do(command).code == 0 and runs.result(output) == self.alone(method)[0]


def kill(laboratory: Laboratory, tries: int = 40) -> Iterator[dict[str, Any]]:
    """Kill -9 at a random moment; the same command goes on."""
    return signals(laboratory, signal.SIGKILL, tries, {-signal.SIGKILL})


def terminate(laboratory: Laboratory, tries: int = 10) -> Iterator[dict[str, Any]]:
    """SIGTERM at a random moment; the same command goes on."""
    return signals(laboratory, signal.SIGTERM, tries, {-signal.SIGTERM, 128 + signal.SIGTERM})


def signals(
    laboratory: Laboratory, number: signal.Signals, tries: int, codes: set[int]
) -> Iterator[dict[str, Any]]:
    """A run that was done before its signal came isn't counted."""
    dice = random.Random(SEED)
    found: dict[str, Any] = {"tried": 0, "done before": 0, "equal": 0, "ended by": {}, "steps": []}
    for method in cycle(METHODS):
        if found["tried"] == tries:
            return
        whole, seconds = laboratory.alone(method)
        command, output = laboratory.command(method)
        process = laboratory.start(command)
        metrics, lines = output / "metrics.jsonl", len(whole["metrics"])
        logged = dice.randrange(lines)  # by what is written: seconds differ on a busy machine
        while logged and (not metrics.exists() or metrics.read_bytes().count(b"\n") < logged):
            time.sleep(0.002)
        time.sleep(dice.uniform(0, seconds / lines))
        os.kill(process, number)  # one that has ended waits to be asked for its exit code
        end = laboratory.wait(process)
        if end.code == 0:
            found["done before"] += 1
            continue
        assert end.code in codes, end
        steps = [row["step"] for row in runs.json_lines(metrics)] if metrics.exists() else []
        found["tried"] += 1
        found["ended by"][end.code] = found["ended by"].get(end.code, 0) + 1
        found["steps"].append(max(steps, default=None))
        found["equal"] += laboratory.finishes(method, command, output)
        yield found


def full_disk(laboratory: Laboratory, tries: int = 10) -> Iterator[dict[str, Any]]:
    """No file may grow beyond a size, of which ten are tried; then it may."""
    found: dict[str, Any] = {"tried": 0, "refused in a sentence": 0, "done": 0, "equal": 0}
    found["other"] = []
    sizes = (100, 1_000, 4_000, 10_000, 20_000, 40_000, 80_000, 120_000, 160_000, 240_000)
    for size in sizes[:tries]:
        command, output = laboratory.command("promptkd")

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        end = laboratory.do(command, limit)
        found["tried"] += 1
        found["done"] += end.code == 0
        found["refused in a sentence"] += end.code == 1 and "No space left" in end.said
        found["equal"] += laboratory.finishes("promptkd", command, output)
        if not end.in_a_sentence:
            found["other"].append(f"{size} bytes: exit {end.code}, {end.said[-500:]}")
        yield found


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "overwritten": lambda content: b"\xff" * len(content),
}


def damage(laboratory: Laboratory, tries: int = 1000) -> Iterator[dict[str, Any]]:
    """Each file of an unfinished run, emptied, cut in half and overwritten.

    The run goes on to the same end in all of its files, having said what was damaged; or it is
    refused in a sentence that names the file.
    """
    found: dict[str, Any] = {"tried": 0, "equal": 0, "lines lost, said": 0, "refused": 0}
    found["other"] = []
    command, output = laboratory.command("promptkd")
    process = laboratory.start(command)
    while not (output / "checkpoints" / "step-000006").exists():
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    laboratory.wait(process)
    kept = laboratory.place / "kept"
    shutil.copytree(output, kept)
    assert laboratory.do(command).code == 0
    expected = _contents(output)
    names = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    for name, how in islice(((n, h) for n in names for h in WAYS), tries):
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        path = output / name
        path.write_bytes(WAYS[how](path.read_bytes()))
        end = laboratory.do(command)
        found["tried"] += 1
        other = _differing(_contents(output), expected)
        place = name.partition("/step-")[0] if "/step-" in name else name
        named = place in end.said or name.startswith(".")
        lost = {name, "student/README.md"} if name == "metrics.jsonl" else {name}  # shows the start
        if end.code == 0 and not other:
            found["equal"] += 1
        elif end.code == 0 and other <= lost and named:
            found["lines lost, said"] += 1
        elif end.code == 1 and end.in_a_sentence and named:
            found["refused"] += 1
        else:
            found["other"].append(f"{name} {how}: exit {end.code}, other {sorted(other)}")
        yield found


def _contents(output: Path) -> dict[str, Any]:
    """Of every file of a run; times are left out."""
    found: dict[str, Any] = {}
    for path in output.rglob("*"):
        name = str(path.relative_to(output))
        if name.endswith("metrics.jsonl"):
            found[name] = runs.json_lines(path)
        elif name.endswith("summary.json"):
            found[name] = runs.timeless(json.loads(path.read_text()))
        elif path.is_file() and path.name != "environment.json":
            found[name] = path.read_bytes()
    return found


def _differing(found: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    return {n for n in {*found, *expected} if found.get(n) != expected.get(n)}


def two_processes(laboratory: Laboratory, tries: int = 10) -> Iterator[dict[str, Any]]:
    """Two commands on one output at once."""
    found = {"tried": 0, "one trained": 0, "equal": 0}
    for _ in range(tries):
        command, output = laboratory.command("promptkd")
        ends = [laboratory.start(command), laboratory.start(command)]
        codes = sorted(laboratory.wait(process).code for process in ends)
        found["tried"] += 1
        found["one trained"] += codes == [0, 1]
        found["equal"] += laboratory.finishes("promptkd", command, output)
        yield found


TRIALS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "kill -9": kill,
    "SIGTERM": terminate,
    "full disk": full_disk,
    "two processes": two_processes,
    "damage": damage,
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        laboratory = Laboratory(Path(place))
        for asked in sys.argv[1:] or TRIALS:
            name, _, tries = asked.partition("=")
            found: dict[str, Any] = {}
            for found in TRIALS[name](laboratory, *([int(tries)] if tries else [])):
                print(json.dumps({name: found}), file=sys.stderr, flush=True)
            print(json.dumps({name: found}), flush=True)
