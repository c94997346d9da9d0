"""Two processes that share every weight give the numbers of one that has them all."""

from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from test_ranks import assert_same_run, recipe

LORA = {"lora": {"r": 2, "alpha": 4}}
PROMPTKD = {"name": "promptkd", "rollouts": "reference"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({"name": "sft"}, {}),
    "gkd": ({"name": "gkd", "student_share": 0.0, "divergence": "forward_kl"}, {}),
    "promptkd": (PROMPTKD, {}),
    "promptkd, together": (PROMPTKD, {"teacher_step": "with_student"}),
    "promptkd, graphs kept": (PROMPTKD, {"micro_batch_tokens": 400}),
    "promptkd, checkpointed": (PROMPTKD, {"gradient_checkpointing": True}),
    "promptkd, adamw": (PROMPTKD, {"optimizer": "adamw", "learning_rate": 1e-3}),
    "lora teacher": (PROMPTKD | {"teacher": "lora"}, {}),
    "prefix teacher": (PROMPTKD | {"teacher": "prefix"}, {}),
    "minillm": ({"name": "minillm"}, {}),
    "distillm": ({"name": "distillm", "student_share": 1.0, "capacity": 2}, {}),
    "distillm2": ({"name": "distillm2"}, {}),
    "written by the student": ({"name": "promptkd"}, {}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 3)
    return directory


@pytest.fixture(scope="module")
def raws(pair: Path, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The recipes of both sides, without their output."""
    made = {}
    for name, (method, optimization) in CASES.items():
        made[name] = recipe(pair, method, Path("unset"), max_steps=2, **optimization)
    made["lora student"] = made["gkd"] | {"student": made["gkd"]["student"] | LORA}
    return made


@pytest.fixture(scope="module")
def shared(raws: dict[str, dict[str, Any]], tmp_path_factory) -> Path:
    """Runs of all cases on two processes that share both models."""
    place = tmp_path_factory.mktemp("shared")
    own = [raw | {"sharding": "fsdp", "output": str(place / name)} for name, raw in raws.items()]
    outcomes = runs.train_on_ranks(own, place / "processes", 2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    return place


@pytest.mark.parametrize("name", [*CASES, "lora student"])
def test_a_shared_run_equals_one_process(raws, shared, tmp_path, name):
    one = runs.train(raws[name] | {"output": str(tmp_path / "one")})

    assert_same_run(one, shared / name)
