"""Two processes give the numbers of one, and write as if they were one."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import runs
import tiny
from promptkd import ranks
from promptkd.errors import UserError
from promptkd.files import write_json_lines

MAX_STEPS = 3
METHODS = {
    "sft": {"name": "sft"},
    "gkd": {"name": "gkd", "student_share": 0.0, "divergence": "forward_kl"},
    "promptkd": {"name": "promptkd", "rollouts": "reference"},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 3)
    return directory


def recipe(pair: Path, method: dict[str, Any], output: Path, **optimization: Any) -> dict[str, Any]:
    """Batches of five are shared out unevenly; SGD hides no wrong scale."""
    raw = tiny.recipe(
        pair,
        method=method,
        data={"validation": str(pair / "valid.jsonl"), "max_response_tokens": 8},
        evaluation={"every_steps": 0, "metric": "cross_entropy"},
        checkpoints={"every_steps": 1},
        output=str(output),
    )
    raw["optimization"] |= {
        "max_steps": MAX_STEPS,
        "optimizer": "sgd",
        "global_batch_size": 5,
        "micro_batch_tokens": 40,
        "learning_rate": 0.1,
        "teacher_learning_rate": 0.1,
    }
    raw["optimization"] |= optimization
    return raw


def on_ranks(raw: dict[str, Any], place: Path, num_ranks: int = 2) -> None:
    place.mkdir(exist_ok=True)
    outcomes = runs.run_on_ranks(["train", runs.write_recipe(place, raw)], place, num_ranks)
    assert [outcome.status for outcome in outcomes] == num_ranks * [0], outcomes[0].stderr


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, adapter, losses and scores, to the last float digits."""
    weights = [f"student/{path.name}" for path in (first / "student").glob("*.safetensors")]
    assert weights
    if (first / "teacher_adapter").exists():
        weights.append("teacher_adapter/adapter_model.safetensors")
    for name in weights:
        assert_close(load_file(first / name), load_file(second / name), rtol=1e-5, atol=1e-6)
    mine, other = (runs.json_lines(run / "metrics.jsonl") for run in (first, second))
    assert len(mine) == len(other)
    for row, same in zip(mine, other, strict=True):
        for key in row.keys() - {"padding_share", "flops", "evaluation"}:
            assert row[key] == pytest.approx(same[key], rel=1e-5), (row["step"], key)
        assert row.get("evaluation", {}) == pytest.approx(same.get("evaluation", {}), rel=1e-5)
    samples = [runs.json_lines(run / "samples.jsonl") for run in (first, second)]
    for name in ("reverse_kl_to_teacher", "reverse_kl_without_context"):
        kls = [[row.pop(name, 0.0) for row in rows] for rows in samples]
        assert kls[0] == pytest.approx(kls[1], rel=1e-5)
    assert samples[0] == samples[1]


def launched(pair: Path, place: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Promptkd training into ``place``/two, started by a launcher's command line."""
    path = runs.write_recipe(place, recipe(pair, METHODS["promptkd"], place / "two"))
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "promptkd", "train", path],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_launch_with_torchrun_equals_one_process(pair, tmp_path):
    runs.train(recipe(pair, METHODS["promptkd"], tmp_path / "one"))
    result = launched(pair, tmp_path, "torch.distributed.run", "--nproc_per_node", "2")

    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert "ranks 2, device cpu" in result.stdout
    assert result.stdout.count(f"finished: {tmp_path / 'two'}") == 1


def test_a_launch_by_accelerate_that_starts_one_process_for_two_is_refused(pair, tmp_path):
    options = ("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    launch = ("accelerate.commands.launch", *options, "--dynamo_backend", "no")
    result = launched(pair, tmp_path, *launch)

    assert result.returncode != 0
    assert "was asked for several processes on CPUs and started one" in result.stderr


def test_two_ranks_equal_one(pair, tmp_path):
    runs.train(recipe(pair, METHODS["gkd"], tmp_path / "one"))
    on_ranks(recipe(pair, METHODS["gkd"], tmp_path / "two"), tmp_path / "processes")

    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_student_writes_the_same_on_two_ranks_as_on_one(pair, tmp_path):
    method = {"name": "promptkd"}
    runs.train(recipe(pair, method, tmp_path / "one", max_steps=1))
    on_ranks(recipe(pair, method, tmp_path / "two", max_steps=1), tmp_path / "processes")

    assert_same_run(tmp_path / "one", tmp_path / "two")


KNOWING = {
    "promptkd": ({"name": "promptkd"}, {"model": "TEACHER"}),
    "sdft": ({"name": "sdft"}, {"model": "student", "follow": "ema", "ema_decay": 0.5}),
}


@pytest.mark.parametrize("name", KNOWING)
def test_a_teacher_that_reads_more_is_the_same_on_two_ranks(tmp_path, name):
    """Contexts of different lengths; for sdft also the moving average that follows the student."""
    tiny.save_pair(tmp_path)
    rows = [
        {"instruction": f"say {i}", "hint": "so " * (i % 4 + 1), "output": f"it is {i}"}
        for i in range(12)
    ]
    write_json_lines(tmp_path / "train.jsonl", rows)
    write_json_lines(tmp_path / "valid.jsonl", rows[:3])
    method, teacher = KNOWING[name]
    teacher = teacher | {"context": "hint", "context_template": "{{ context }} ~ {{ request }}"}
    teacher["model"] = teacher["model"].replace("TEACHER", str(tmp_path / "teacher"))
    for output in ("one", "two"):
        raw = recipe(tmp_path, method, tmp_path / output, max_steps=2) | {"teacher": teacher}
        if output == "one":
            runs.train(raw)
        else:
            on_ranks(raw, tmp_path / "processes")

    assert_same_run(tmp_path / "one", tmp_path / "two")


@runs.needs_vllm
def test_an_engine_of_vllm_on_each_rank_writes_as_one_does(tmp_path):
    heads = {"width": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # what vLLM can
    tiny.save_pair(tmp_path, student_options={"seed": 3, **heads})
    tiny.write_data(tmp_path / "train.jsonl")
    tiny.write_data(tmp_path / "valid.jsonl", 3)
    for num_ranks in (1, 2):
        output = tmp_path / f"run-{num_ranks}"
        raw = recipe(tmp_path, {"name": "gkd", "student_share": 1.0}, output, max_steps=2)
        raw["sampling"] = raw.get("sampling", {}) | {"engine": "vllm"}
        on_ranks(raw, tmp_path / f"processes-{num_ranks}", num_ranks)

    assert_same_run(tmp_path / "run-1", tmp_path / "run-2")


def test_two_ranks_equal_one_and_only_the_main_process_writes(pair, tmp_path):
    runs.train(recipe(pair, METHODS["sft"], tmp_path / "one"))
    on_ranks(recipe(pair, METHODS["sft"], tmp_path / "run"), tmp_path / "processes")
    assert_same_run(tmp_path / "one", tmp_path / "run")
    rows = runs.json_lines(tmp_path / "run" / "metrics.jsonl")
    said = [(tmp_path / "processes" / f"rank-{i}" / "stdout").read_text() for i in range(2)]

    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert len(runs.json_lines(tmp_path / "run" / "samples.jsonl")) == 2 * 3
    assert "finished: " in said[0]
    assert "finished: " not in said[1]


@pytest.mark.parametrize(
    "method",
    [{"name": "promptkd"}, {"name": "distillm", "student_share": 1.0, "capacity": 2}],
    ids=lambda method: method["name"],
)
def test_a_rank_that_is_killed_stops_all_and_together_they_go_on(pair, tmp_path, method):
    on_ranks(recipe(pair, method, tmp_path / "whole", max_steps=6), tmp_path / "processes")
    raw = recipe(pair, method, tmp_path / "run", max_steps=6)
    path = runs.write_recipe(tmp_path, raw)
    moment = runs.Moment("open", ".writing-step-000004")
    outcomes = runs.run_on_ranks(["train", path], tmp_path / "killed", 2, dies_at=moment)
    assert outcomes[0].status == -9
    assert outcomes[1].status == 1
    assert "promptkd: Rank 0 of 2 was lost in the checkpoint of step 4" in outcomes[1].stderr
    assert "Traceback" not in outcomes[1].stderr
    on_ranks(raw, tmp_path / "again")

    assert runs.result(tmp_path / "run") == runs.result(tmp_path / "whole")


def test_a_rank_that_stands_still_ends_the_others(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKD_PATIENCE", "8")
    raw = recipe(pair, METHODS["promptkd"], tmp_path / "run", max_steps=10**6)
    commands = runs.start_on_ranks(["train", runs.write_recipe(tmp_path, raw)], tmp_path, 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    runs.wait(lambda: metrics.exists() and '"step": 3' in metrics.read_text())
    commands[1].kill(signal.SIGSTOP)
    outcome = commands[0].wait()
    commands[1].kill()
    assert outcome.status == 1
    assert re.search(
        r"Rank 1 of 2 stands still in (step|the checkpoint of step) \d", outcome.stderr
    )


@pytest.mark.parametrize(
    ("name", "differs", "says"),
    [
        ("place", "output=elsewhere", "Rank 1 of 2 doesn't see .*/run of rank 0, from which"),
        ("seed", "seed=5", r"Rank 1 of 2 doesn't have what rank 0 has \(recipe.seed 0 -> 5\)"),
        ("rows", "data.train=fewer.jsonl", r"Rank 1 .*data.train.*, training requests"),
    ],
)
def test_what_differs_on_a_machine_is_named_on_all(
    pair, tmp_path, monkeypatch, name, differs, says
):
    """Paths that aren't shared, commands and files that aren't the same."""
    monkeypatch.setenv("PROMPTKD_PATIENCE", "10")
    tiny.write_data(tmp_path / "fewer.jsonl", 8)
    path = runs.write_recipe(tmp_path, recipe(pair, METHODS["sft"], tmp_path / "run"))
    key, _, value = differs.partition("=")
    value = value if name == "seed" else str(tmp_path / value)
    command = ["train", path]
    started = runs.start_on_ranks(command, tmp_path / name, 2, others=[*command, f"{key}={value}"])
    outcomes = [process.wait() for process in started]

    assert [outcome.status for outcome in outcomes] == [1, 1]
    for outcome in outcomes:
        assert re.search(says, outcome.stderr), outcome.stderr
    assert not (tmp_path / "run" / "environment.json").exists()


def test_why_a_rank_ended_is_said_by_the_others(pair, tmp_path):
    """Its machine has no such file; what it says itself stands in its own log alone."""
    command = ["train", runs.write_recipe(tmp_path, recipe(pair, METHODS["sft"], tmp_path / "run"))]
    others = [*command, f"data.train={tmp_path / 'nothing.jsonl'}"]
    started = runs.start_on_ranks(command, tmp_path / "processes", 2, others=others)
    outcomes = [process.wait() for process in started]

    assert [outcome.status for outcome in outcomes] == [1, 1]
    said = outcomes[1].stderr.strip().removeprefix("promptkd: ")
    assert f"Rank 1 of 2 ended in loading and said: {said}" in outcomes[0].stderr


def launch(monkeypatch, rank: int, port: int, seconds: float) -> None:
    """This process as one of two, of which the other never comes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(ranks, "ARRIVAL", seconds)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_named(monkeypatch, rank):
    launch(monkeypatch, rank, runs.free_port(), seconds=1.0)
    monkeypatch.setattr(ranks, "LONGER", 0.0)

    with pytest.raises(UserError, match=f"Rank {1 - rank} of 2 didn't come to 127.0.0.1:"):
        ranks.meet()


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        launch(monkeypatch, 0, taken.getsockname()[1], seconds=5.0)
        with pytest.raises(UserError, match="is taken on the machine of rank 0"):
            ranks.meet()


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(pair, tmp_path):
    raw = recipe(pair, METHODS["sft"], tmp_path / "run", global_batch_size=1)
    path = runs.write_recipe(tmp_path, raw)
    outcomes = runs.run_on_ranks(["train", path], tmp_path / "processes", 2)

    assert [outcome.status for outcome in outcomes] == [1, 1]
    assert "global_batch_size 1 is smaller than the number of processes 2" in outcomes[0].stderr
