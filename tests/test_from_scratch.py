"""The one-file exposition and the library are the same algorithm."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from promptkd.api import train
from promptkd.config import recipe_from_dict
from tiny import recipe, save_pair, write_data

EXAMPLE = Path(__file__).parents[1] / "examples" / "promptkd_from_scratch.py"


def load_example():
    specification = importlib.util.spec_from_file_location("promptkd_from_scratch", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Three steps of four requests each, by the library and by the example."""
    place = tmp_path_factory.mktemp("from-scratch")
    student, teacher = save_pair(place, "llama")
    data = write_data(place / "train.jsonl", 6)
    too_long = json.dumps({"instruction": "say it again " * 20})
    with_input = json.dumps({"instruction": "say", "input": "this"})
    data.write_text(f"{too_long}\n{with_input}\n{data.read_text()}")
    raw = recipe(
        place,
        data={"template": "alpaca", "max_request_tokens": 280},
        optimization={"learning_rate": 1e-3, "micro_batch_tokens": 600},
        seed=2,
    )
    run = train(recipe_from_dict(raw))
    losses = load_example().main(
        [
            *("--student", str(student), "--teacher", str(teacher)),
            *("--data", str(data), "--output", str(place / "example")),
            *("--steps", "3", "--batch-size", "4", "--seed", "2"),
            *("--learning-rate", "1e-3", "--prompt-learning-rate", "1e-2"),
            *("--max-request-tokens", "280", "--max-response-tokens", "24"),
        ]
    )
    return run, place / "example", losses, student


def test_the_example_writes_the_same_responses_and_has_the_same_losses_as_the_library(both):
    run, _, losses, _ = both
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(losses) == 3
    assert 0 < sum(row["share_ended"] for row in rows) < 3  # some responses end, some are cut
    for row, loss in zip(rows, losses, strict=True):
        annealed = (3 - row["step"]) / 3
        adaptation = row["kl_teacher_student"] + annealed * row.get("kl_teacher_plain", 0.0)
        assert loss["prompt_loss"] == pytest.approx(adaptation, rel=1e-5)
        assert loss["student_loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_three_steps_of_the_example_end_in_the_librarys_student(both):
    run, example, _, start = both
    ours, theirs = (load_file(p / "model.safetensors") for p in (run / "student", example))
    before = load_file(start / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        torch.testing.assert_close(theirs[name], weights, rtol=0, atol=1e-5)
    assert max((ours[n] - before[n]).abs().max() for n in ours) > 2e-3


def test_three_steps_of_the_example_end_in_the_librarys_soft_prompt(both):
    run, example, _, _ = both
    adapter = load_file(run / "teacher_adapter" / "adapter_model.safetensors")
    vectors = torch.load(example / "soft_prompt.pt", weights_only=True)
    torch.testing.assert_close(vectors, adapter["prompt_embeddings"], rtol=0, atol=1e-5)


def test_the_example_imports_nothing_of_the_library():
    assert "promptkd" not in {
        line.split()[1].partition(".")[0]
        for line in EXAMPLE.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
