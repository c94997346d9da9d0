"""A user's own method, from a file of theirs, through the command line and from Python."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import promptkd as pk
import tiny
from promptkd.cli import main
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.methods import build_method
from promptkd.objectives import TokenView

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def there(monkeypatch):
    """In the directory of the example, as its first lines say."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("custom_method")


def rows(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_example_trains_from_the_command_line_as_it_does_from_python(there, tmp_path):
    student, _ = tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    raw = tiny.recipe(tmp_path, output=str(tmp_path / "by_command"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    overrides = ["method.name=custom_method:confident", "method.anchor=0.2", "method.length=3"]
    with pytest.raises(SystemExit) as exit_status:
        main(["train", str(recipe), *overrides])
    assert exit_status.value.code == 0
    raw |= {"output": str(tmp_path / "by_python"), "method": {"name": "confident"}}
    run = pk.train(recipe_from_dict(raw), there.confident(length=3, anchor=0.2))
    commanded, called = rows(tmp_path / "by_command"), rows(run)
    assert [row["loss"] for row in commanded] == [row["loss"] for row in called]
    assert all(math.isfinite(row["loss"]) for row in called)
    assert {row["student_share"] for row in called} == {0.5}  # one response of each author
    start = load_file(student / "model.safetensors")
    for name in ("by_command", "by_python"):
        trained = load_file(tmp_path / name / "student" / "model.safetensors")
        assert any(not torch.equal(trained[key], start[key]) for key in trained)
    prompts = [
        load_file(tmp_path / name / "teacher_adapter" / "adapter_model.safetensors")
        for name in ("by_command", "by_python")
    ]
    assert torch.equal(prompts[0]["prompt_embeddings"], prompts[1]["prompt_embeddings"])
    assert prompts[0]["prompt_embeddings"].shape == (3, tiny.WIDTH)


def test_the_examples_objective_is_the_weighted_reverse_kl(there):
    q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    view = TokenView(q.log(), p.log(), torch.tensor([0, 1]))
    expected = [
        0.6 * (0.5 * math.log(0.5 / 0.6) + 0.25 * math.log(0.25 / 0.3) + 0.25 * math.log(2.5)),
        0.6 * (0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)),
    ]
    assert there.ConfidentReverseKL()(view).tolist() == pytest.approx(expected, abs=1e-6)


def test_an_unknown_option_of_ones_own_method_names_its_neighbour(there):
    with pytest.raises(UserError, match=r"'method\.ancor'; did you mean 'anchor'"):
        build_method("custom_method:confident", ancor=0.2)


def test_a_module_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "found_here.py").write_text(
        "from promptkd.methods import sft\n\ndef mine():\n    return sft()\n"
    )
    monkeypatch.setattr("sys.path", list(importlib.sys.path))
    monkeypatch.chdir(tmp_path)
    assert build_method("found_here:mine") == build_method("sft")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:mine", "cannot be imported: No module named 'no_such_module'"),
        ("custom_method:no_such_function", "has no attribute 'no_such_function'"),
        ("math:prod", "is a builtin_function_or_method, not a function"),
        ("custom_method:ConfidentReverseKL", "is a type, not a function"),
    ],
)
def test_what_is_not_a_method_is_refused_with_the_reason(there, name, said):
    with pytest.raises(UserError, match=said):
        build_method(name)


DIVERGENCES = """
import torch

def squared(learner, target):
    return (learner.exp() - target.exp()).pow(2).sum(-1)

def of_the_step(learner, target):
    return squared(learner, target).mean()

def cross_entropy(learner, target):
    return -(target.exp() * learner).sum(-1)

def detached(learner, target):
    return squared(learner.detach(), target)

def failing(learner, target):
    return learner @ target

def needing(learner, target, power):
    return squared(learner, target)
"""


@pytest.fixture
def divergences(tmp_path, monkeypatch):
    (tmp_path / "own_divergences.py").write_text(DIVERGENCES)
    monkeypatch.setattr("sys.path", [str(tmp_path), *importlib.sys.path])
    yield "own_divergences"
    importlib.sys.modules.pop("own_divergences", None)


def test_a_divergence_of_ones_own_is_named_in_a_recipe_and_trains(divergences, tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    method = {"name": "gkd", "divergence": f"{divergences}:squared"}
    raw = tiny.recipe(tmp_path, method=method, optimization={"max_steps": 2})
    run = pk.train(recipe_from_dict(raw))
    assert all(0 < row["loss"] < 2 for row in rows(run))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("of_the_step", r"gives \[\] for 3 tokens. It must give one number per token"),
        ("cross_entropy", "between equal distributions. It must be finite, and 0 there"),
        ("detached", "has no gradient"),
        ("failing", "fails on"),
        ("needing", "fails on .*power"),
        ("absent", "has no attribute 'absent'"),
    ],
)
def test_what_is_no_divergence_is_refused_when_the_recipe_is_read(divergences, name, said):
    with pytest.raises(UserError, match=said):
        build_method("gkd", divergence=f"{divergences}:{name}")


def test_a_method_is_named_from_python_too(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    raw = tiny.recipe(tmp_path, optimization={"max_steps": 1})
    run = pk.train(recipe_from_dict(raw), "sft")
    assert "name: sft" in (run / "recipe.yaml").read_text()
