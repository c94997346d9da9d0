"""A run that was killed, at any moment, and started again is the run that was not."""

import time
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from promptkd.training.checkpoints import load_latest
from runs import Moment

MAX_STEPS = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 4)
    return directory


def recipe(pair: Path, **overrides: Any) -> dict[str, Any]:
    """Six short steps: checkpoints after 2, 4, 6; evaluations after 3 and 6."""
    common: dict[str, Any] = {
        "data": {"validation": str(pair / "valid.jsonl"), "max_response_tokens": 6},
        "evaluation": {"every_steps": 3, "metric": "reverse_kl_to_teacher"},
        "checkpoints": {"every_steps": 2},
    }
    raw = tiny.recipe(pair, **common)
    raw["optimization"] |= {"max_steps": MAX_STEPS, **overrides.pop("optimization", {})}
    return raw | overrides


def train(pair: Path, place: Path, raw: dict[str, Any], dies_at: Moment | None = None):
    """Train into ``place``/run, with a response cache of its own."""
    place.mkdir(exist_ok=True)
    path = runs.write_recipe(place, raw)
    return runs.run(
        ["train", path, f"output={place / 'run'}"],
        place,
        environment={"PROMPTKD_CACHE": str(place / "cache")},
        dies_at=dies_at,
    )


def uninterrupted(pair: Path, place: Path, raw: dict[str, Any]) -> dict[str, Any]:
    outcome = train(pair, place, raw)
    assert outcome.status == 0, outcome.stderr
    return runs.result(place / "run")


IN_A_STEP = Moment("open", "metrics.jsonl", 3)
IN_A_CHECKPOINT = Moment("open", ".writing-step-000004/student_optimizer.pt")


def test_promptkd_survives_kill_9_at_each_delicate_moment(pair, tmp_path):
    raw = recipe(pair)
    expected = uninterrupted(pair, tmp_path / "whole", raw)
    assert expected["summary"]["best"]["step"] == MAX_STEPS, "student/ was replaced once"

    moments = {
        "claiming the directory": Moment("os.rename", ".writing-environment.json"),
        "after claiming it": Moment("open", "metrics.jsonl"),
        "logging the second step": Moment("open", "metrics.jsonl", 3),
        "writing the first checkpoint": Moment("open", ".writing-step-000002/student_optimizer"),
        "naming it": Moment("os.rename", ".writing-step-000002"),
        "writing the first student": Moment("os.rename", ".writing-student"),
        "rewinding the metrics": Moment("open", ".writing-metrics.jsonl"),
        "writing the second checkpoint": Moment(
            "open", ".writing-step-000004/.writing-progress.json"
        ),
        "between the renames that replace the student": Moment("os.rename", ".writing-student", 2),
        "between those that replace the adapter": Moment("os.rename", ".writing-teacher_adapter"),
        "removing the oldest checkpoint": Moment("shutil.rmtree", "step-000002"),
        "finishing": Moment("os.rename", ".writing-summary.json"),
    }
    for doing, moment in moments.items():
        outcome = train(pair, tmp_path / "killed", raw, moment)
        assert outcome.status == -9, f"{doing}: {outcome.stderr}"
        assert not (tmp_path / "killed" / "run" / "summary.json").exists()
        assert load_latest(tmp_path / "killed" / "run" / "checkpoints")[1] == []
    outcome = train(pair, tmp_path / "killed", raw)

    assert outcome.status == 0, outcome.stderr
    assert runs.result(tmp_path / "killed" / "run") == expected
    left_over = [p.name for p in (tmp_path / "killed" / "run").rglob(".*")]
    assert left_over == []


@pytest.mark.parametrize(
    ("method", "optimization"),
    [
        ({"name": "promptkd"}, {"teacher_step": "with_student", "micro_batch_tokens": 60}),
        ({"name": "gkd", "student_share": 0.5}, {"schedule": "cosine", "warmup_steps": 2}),
        ({"name": "seqkd"}, {"optimizer": "sgd"}),
        ({"name": "promptkd", "sft_share": 0.5}, {"micro_batch_tokens": 60}),
        ({"name": "distillm", "student_share": 0.7, "capacity": 3}, {}),
    ],
    ids=lambda value: value.get("name", ""),
)
def test_every_kind_of_state_survives_kill_9(pair, tmp_path, method, optimization):
    raw = recipe(pair, method=method, optimization=optimization)
    expected = uninterrupted(pair, tmp_path / "whole", raw)

    for moment in (IN_A_STEP, IN_A_CHECKPOINT):
        outcome = train(pair, tmp_path / "killed", raw, moment)
        assert outcome.status == -9, outcome.stderr
    outcome = train(pair, tmp_path / "killed", raw)

    assert f"resuming {tmp_path / 'killed' / 'run'} after step 2" in outcome.stdout
    assert runs.result(tmp_path / "killed" / "run") == expected


def test_kill_9_from_outside_loses_nothing_either(pair, tmp_path):
    raw = recipe(pair, method={"name": "kd"})
    expected = uninterrupted(pair, tmp_path / "whole", raw)
    path, output = runs.write_recipe(tmp_path, raw), tmp_path / "run"
    metrics = output / "metrics.jsonl"

    command = runs.Command(["train", path, f"output={output}"], tmp_path / "first")
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    command.kill()

    assert command.wait().status == -9
    outcome = runs.run(["train", path, f"output={output}"], tmp_path / "second")
    assert outcome.status == 0, outcome.stderr
    assert runs.result(output) == expected


def test_training_a_finished_run_again_says_so_and_touches_nothing(pair, tmp_path):
    raw = recipe(pair, method={"name": "sft"})
    uninterrupted(pair, tmp_path, raw)
    before = runs.everything(tmp_path / "run")
    outcome = train(pair, tmp_path, raw)

    assert outcome.status == 0
    assert f"{tmp_path / 'run'} is finished; nothing to do." in outcome.stdout
    assert runs.everything(tmp_path / "run") == before


def test_a_resume_that_would_learn_from_something_else_is_refused_by_name(pair, tmp_path):
    place = tmp_path / "place"
    outcome = train(pair, place, recipe(pair), IN_A_CHECKPOINT)
    assert outcome.status == -9
    other = tiny.write_data(tmp_path / "train.jsonl", 12)
    original = (pair / "train.jsonl").read_text()
    try:
        (pair / "train.jsonl").write_text(other.read_text().replace("say 1", "say one"))
        outcome = train(pair, place, recipe(pair))
    finally:
        (pair / "train.jsonl").write_text(original)
    assert outcome.status == 1
    assert "began with other training requests than there are now" in outcome.stderr
    assert train(pair, place, recipe(pair)).status == 0
