"""The files of recipes/launch/ start what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
import tiny

LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_launch_file_is_a_shells_and_names_the_command(path):
    shell = "bash" if path.suffix == ".sbatch" else "sh"
    subprocess.run([shell, "-n", path], check=True)

    assert "promptkd train" in path.read_text() or "rank.sh" in path.read_text()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"HEAD": "localhost"}, "NODE: is the number of this machine"),
        ({"NODE": "0"}, "HEAD: is the name or address of the first machine"),
        ({"HEAD": "localhost", "NODE": "2"}, "NODE is 2; of 2 machines the last one is 1"),
        ({"HEAD": "nowhere.invalid", "NODE": "0"}, "this machine doesn't know nowhere.invalid"),
    ],
    ids=["no NODE", "no HEAD", "NODE too large", "HEAD unknown"],
)
def test_what_two_nodes_must_be_told_is_asked_for_at_once(given, says):
    known = {name: value for name, value in os.environ.items() if name not in ("HEAD", "NODE")}
    command = ["sh", LAUNCH / "two-nodes.sh", "recipe.yaml"]
    ended = subprocess.run(command, env=known | given, capture_output=True, text=True)

    assert ended.returncode == 2
    assert says in ended.stderr


@pytest.mark.parametrize(
    ("of_nodes", "on_each"), [("8(x2)", "8"), ("4", "4"), ("2,1", "2"), ("3(x2),1", "3")]
)
def test_a_task_of_slurms_knows_how_many_are_on_its_machine(of_nodes, on_each, tmp_path):
    said = tmp_path / "said"
    told = {"PROCID": "9", "LOCALID": "1", "NTASKS": "16", "STEP_TASKS_PER_NODE": of_nodes}
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE" > {said}\n'
    )
    python.chmod(0o755)
    environment = {f"SLURM_{name}": value for name, value in told.items()}
    environment |= {"PYTHON": str(python), "PATH": os.environ["PATH"]}
    subprocess.run(["sh", LAUNCH / "rank.sh", "recipe.yaml"], env=environment, check=True)

    assert said.read_text().split() == ["9", "1", "16", on_each]


@pytest.mark.parametrize(
    ("status", "is_queued"), [(138, True), (0, False), (1, False), (137, False)]
)
def test_a_job_is_queued_again_after_its_signal_alone(status, is_queued, tmp_path):
    """By the status of srun; no task may be killed because another one has ended, having saved."""
    asked = tmp_path / "asked"
    for name, ends in (("srun", status), ("scontrol", 0)):
        made = tmp_path / name
        made.write_text(f'#!/bin/sh\necho {name} "$@" >> {asked}\nexit {ends}\n')
        made.chmod(0o755)
    told = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "SUBMIT_DIR": str(LAUNCH.parents[1])}
    environment = {f"SLURM_{name}": value for name, value in told.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "recipe.yaml"], env=environment)
    lines = asked.read_text().splitlines()

    assert job.returncode == status
    assert ("scontrol requeue 7" in lines) == is_queued
    assert f"srun --kill-on-bad-exit=0 sh {LAUNCH / 'rank.sh'} recipe.yaml" in lines


def start_under_slurm(recipe: str, num_tasks: int, port: int) -> list[subprocess.Popen[str]]:
    """As srun does: one process per task, which knows its number by Slurm's variables."""
    common = {
        "SLURM_NTASKS": str(num_tasks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
    }
    return [
        subprocess.Popen(
            ["sh", LAUNCH / "rank.sh", recipe],
            env=os.environ | common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_tasks)
    ]


def test_a_job_of_slurms_stops_before_its_time_and_goes_on_when_it_is_queued_again(tmp_path):
    """SIGUSR1 reaches every task; status 138 is what slurm.sbatch queues a job again by."""
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    optimization = {"max_steps": 40, "micro_batch_tokens": 128}
    path = runs.write_recipe(tmp_path, tiny.recipe(tmp_path, optimization=optimization))
    port = runs.free_port()
    first = start_under_slurm(path, 2, port)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() and first[0].poll() is None:
        time.sleep(0.1)
    for task in first:
        task.send_signal(signal.SIGUSR1)
    said = [task.communicate() for task in first]

    assert [task.returncode for task in first] == [138, 138], said
    assert not (tmp_path / "run" / "summary.json").exists()
    again = start_under_slurm(path, 2, port)
    said = [task.communicate() for task in again]
    assert [task.returncode for task in again] == [0, 0], said
    assert "ranks 2, device cpu" in said[0][0]
    assert "resuming" in said[0][0]
    assert (tmp_path / "run" / "summary.json").exists()
