"""A run that is asked to stop saves and says so; one that diverged has a way back."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
import tiny
from promptkd.config import recipe_from_dict
from promptkd.errors import NotFinite, UserError
from promptkd.methods import build_method
from promptkd.training.checkpoints import load_step, saved_checkpoints, step_of
from promptkd.training.divergence import is_sane
from promptkd.training.lock import locked
from promptkd.training.run_directory import RunDirectory

MAX_STEPS = 40


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    return directory


def recipe(pair: Path, output: Path, **optimization: Any) -> dict[str, Any]:
    raw = tiny.recipe(pair, method={"name": "kd"}, checkpoints={"every_steps": 1000})
    raw["optimization"] |= {"max_steps": MAX_STEPS} | optimization
    return raw | {"output": str(output)}


def start(raw: dict[str, Any], place: Path, num_lines: int) -> runs.Command:
    """Train in a process of its own; returns when so many steps are logged."""
    place.mkdir(exist_ok=True)
    command = runs.Command(["train", runs.write_recipe(place, raw)], place)
    metrics = Path(raw["output"]) / "metrics.jsonl"
    runs.wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= num_lines)
    return command


def last_step(output: Path) -> int:
    return step_of(saved_checkpoints(output / "checkpoints")[-1])


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> dict[str, Any]:
    """The result of a run that nobody stopped."""
    return runs.result(runs.train(recipe(pair, tmp_path_factory.mktemp("whole") / "run")))


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(
    pair, whole, tmp_path, number, status
):
    raw = recipe(pair, tmp_path / "run")
    command = start(raw, tmp_path / "first", num_lines=3)
    command.kill(number)
    outcome = command.wait()

    assert outcome.status == status, outcome.stderr
    saved = last_step(tmp_path / "run")
    assert 3 <= saved < MAX_STEPS
    said = f"Stopped by {signal.Signals(number).name} after step {saved} of {MAX_STEPS}"
    assert f"{said}; the same command goes on." in outcome.stderr
    assert "Traceback" not in outcome.stderr
    runs.train(raw)
    assert runs.result(tmp_path / "run") == whole


def test_a_signal_to_one_rank_stops_all_of_them_with_everything_saved(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=400)
    commands = runs.start_on_ranks(["train", runs.write_recipe(tmp_path, raw)], tmp_path, 2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    runs.wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    commands[1].kill(signal.SIGTERM)
    outcomes = [command.wait() for command in commands]

    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes[0].stderr
    assert f"after step {last_step(tmp_path / 'run')} of 400" in outcomes[0].stderr


def test_a_second_process_is_told_who_trains_and_touches_nothing(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=1000)
    command = start(raw, tmp_path / "first", num_lines=1)
    second = runs.run(["train", runs.write_recipe(tmp_path, raw)], tmp_path / "second")
    command.kill(signal.SIGTERM)

    assert command.wait().status == 143
    assert second.status == 1
    assert f"is being trained by process {command.process.pid} on {os.uname().nodename}" in (
        second.stderr
    )
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_dead_process_owns_nothing(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=1000)
    command = start(raw, tmp_path / "first", num_lines=1)
    command.kill()
    command.wait()

    assert (tmp_path / "run" / ".lock").exists()
    with locked(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()


def test_a_finished_run_grows_to_more_steps_and_its_record_says_so(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=4)
    runs.train(raw)
    runs.train(recipe(pair, tmp_path / "run", max_steps=7))
    whole = runs.train(recipe(pair, tmp_path / "whole", max_steps=7))

    assert runs.result(tmp_path / "run") == runs.result(whole)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["changes"] == [
        {"after_step": 4, "changed": ["optimization.max_steps 4 -> 7"]},
    ]
    with pytest.raises(UserError, match=r"max_steps 7 -> 4.*--allow-changes"):
        runs.train(raw)


def test_changes_are_refused_unless_allowed_and_then_recorded(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=3)
    runs.train(raw)
    other = recipe(pair, tmp_path / "run", max_steps=4) | {"seed": 1}
    path = runs.write_recipe(tmp_path, other)
    refused = runs.run(["train", path], tmp_path / "refused")
    allowed = runs.run(["train", path, "--allow-changes"], tmp_path / "allowed")

    assert refused.status == 1
    assert "(seed 0 -> 1)" in refused.stderr
    assert "--allow-changes goes on with it" in refused.stderr
    assert allowed.status == 0, allowed.stderr
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["identity"]["recipe"]["seed"] == 1
    assert record["changes"][0]["changed"] == ["optimization.max_steps 3 -> 4", "seed 0 -> 1"]


def test_other_weights_of_the_teacher_go_on_only_where_that_is_allowed(pair, tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    runs.train(recipe(tmp_path, tmp_path / "run", max_steps=2))
    weights = tmp_path / "teacher" / "model.safetensors"
    changed = {name: 0.9 * tensor for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    grown = recipe(tmp_path, tmp_path / "run", max_steps=3)

    with pytest.raises(UserError, match=r"began with other teacher weights.*--allow-changes"):
        runs.train(grown)
    runs.train(grown, allow_changes=True)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "other teacher weights" in record["changes"][0]["changed"]


def test_a_run_that_diverged_says_the_command_that_goes_back_and_it_works(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=12, learning_rate=1e-3)
    raw["checkpoints"] = {"every_steps": 2, "keep": 2}
    runs.train(raw | {"optimization": raw["optimization"] | {"max_steps": 6}})
    wild = raw["optimization"] | {"learning_rate": 1e30, "max_grad_norm": 1e9}
    with pytest.raises(NotFinite) as diverged:
        runs.train(raw | {"optimization": wild}, restart_from=6)
    sentence = str(diverged.value)
    command = sentence.partition("promptkd train ")[2].split()

    assert "The run diverged: its steps were too long (learning_rate 1e+30)." in sentence
    assert command[1:] == ["--restart-from", "6", "optimization.learning_rate=0.001"]
    saved = load_step(tmp_path / "run" / "checkpoints", 6)
    assert all(torch.isfinite(t).all() for t in saved.tensors["student"].values())
    outcome = runs.run(["train", *command], tmp_path)
    assert outcome.status == 0, outcome.stderr
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [change["after_step"] for change in record["changes"]] == [6, 6]
    assert record["changes"][1]["changed"] == ["optimization.learning_rate 1e+30 -> 0.001"]


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=2)
    runs.train(raw)
    with pytest.raises(UserError, match=r"step 5 can't be used: it doesn't exist.* 0, 2 "):
        runs.train(raw, restart_from=5)


def test_weights_are_judged_by_the_step_that_began_with_them():
    losses = {1: 2.0, 2: 1.8, 3: 1.9, 4: 60.0, 5: 2.0}

    assert [is_sane(losses, step) for step in losses] == [True, True, False, True, True]
    assert not is_sane({1: 2.0, 2: 60.0}, 2)


@pytest.mark.parametrize("content", [b"", b'{"identity": {"rec', b"\x00\xff\xfe", b"[1]"])
def test_a_damaged_record_ends_in_a_sentence(pair, tmp_path, content):
    raw = recipe(pair, tmp_path / "run", max_steps=1)
    runs.train(raw)
    (tmp_path / "run" / "environment.json").write_bytes(content)
    made = recipe_from_dict(raw)
    with pytest.raises(UserError, match=r"environment.json is damaged, so nobody can say"):
        RunDirectory(made, build_method("kd"))


def test_damaged_and_missing_lines_are_said_and_the_rest_is_kept(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=4)
    runs.train(raw)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0] + "{broken\n" + "".join(lines[2:]))
    path = runs.write_recipe(tmp_path, recipe(pair, tmp_path / "run", max_steps=5))
    outcome = runs.run(["train", path], tmp_path / "again")

    assert outcome.status == 0, outcome.stderr
    assert "metrics.jsonl is damaged in line 2: left out; the rest is kept" in outcome.stdout
    assert "lacks 1 of the 4 steps that were taken (the first is 2)" in outcome.stdout
    assert [row["step"] for row in runs.json_lines(metrics)] == [1, 3, 4, 5]


def test_a_damaged_summary_is_written_again(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=2)
    runs.train(raw)
    whole = runs.result(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_bytes(b"\xff")
    runs.train(raw)

    assert runs.result(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, which promptkd doesn't follow"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "asks for mixed precision bf16"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            "was asked for several processes on CPUs and started one",
        ),
    ],
)
def test_a_launcher_that_asks_for_more_is_refused(
    pair, tmp_path, monkeypatch, variables, complaint
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint):
        runs.train(recipe(pair, tmp_path / "run"))


def test_the_first_lines_and_the_record_say_where_a_run_works(pair, tmp_path, capsys):
    runs.train(recipe(pair, tmp_path / "run", max_steps=1))
    record = json.loads((tmp_path / "run" / "environment.json").read_text())

    assert (
        "ranks 1, device cpu, threads 1, precision float32, template none, "
        in capsys.readouterr().out
    )
    assert (record["ranks"], record["device"], record["precision"]) == (1, "cpu", "float32")


def test_an_output_with_a_name_too_long_ends_in_a_sentence(pair, tmp_path):
    raw = recipe(pair, tmp_path / ("x" * 300), max_steps=1)
    outcome = runs.run(["train", runs.write_recipe(tmp_path, raw)], tmp_path)

    assert outcome.status == 1
    assert "File name too long. Name a shorter one." in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_damaged_recipe_is_written_again_and_lost_samples_are_said(pair, tmp_path):
    raw = recipe(pair, tmp_path / "run", max_steps=1)
    raw["data"] = raw["data"] | {"validation": str(pair / "train.jsonl")}
    runs.train(raw)
    kept, samples = tmp_path / "run" / "recipe.yaml", tmp_path / "run" / "samples.jsonl"
    whole, lines = kept.read_bytes(), samples.read_text().splitlines(keepends=True)
    kept.write_bytes(b"\xff" * len(whole))
    samples.write_text("".join(lines[:2]))
    path = runs.write_recipe(tmp_path, raw)
    outcome = runs.run(["train", path, "optimization.max_steps=2"], tmp_path / "again")

    assert outcome.status == 0, outcome.stderr
    assert kept.read_bytes() == whole.replace(b"max_steps: 1\n", b"max_steps: 2\n")
    assert "samples.jsonl lacks responses of the steps [1]: it was damaged" in outcome.stdout


def test_a_place_where_no_run_can_be_is_refused_before_anything_is_loaded(pair, tmp_path):
    (tmp_path / "file").write_text("mine")
    made = recipe_from_dict(recipe(pair, tmp_path / "file" / "below" / "run"))
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file, no directory"):
        RunDirectory(made, build_method("kd"))
