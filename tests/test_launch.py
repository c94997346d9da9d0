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
