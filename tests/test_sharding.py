"""Two processes that share every weight give the numbers of one that has them all."""

from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from test_ranks import assert_same_run, recipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 3)
    return directory


def shared(pair: Path, method: dict[str, Any], place: Path, **optimization: Any) -> Path:
    """A run on two processes with ``sharding: fsdp``."""
    place.mkdir(exist_ok=True)
    raw = recipe(pair, method, place / "two", **optimization) | {"sharding": "fsdp"}
    outcomes = runs.run_on_ranks(["train", runs.write_recipe(place, raw)], place, 2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    return place / "two"


@pytest.mark.parametrize(
    "method",
    [{"name": "sft"}, {"name": "gkd", "student_share": 0.0, "divergence": "forward_kl"}],
    ids=lambda method: method["name"],
)
def test_a_shared_run_equals_one_process(pair, tmp_path, method):
    one = runs.train(recipe(pair, method, tmp_path / "one"))

    assert_same_run(one, shared(pair, method, tmp_path))
