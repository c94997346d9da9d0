"""Random recipes either take two steps or are refused by a sentence; nothing else happens."""

import copy
import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from promptkd.api import train
from promptkd.config import load_recipe
from promptkd.errors import UserError
from promptkd.methods import METHODS

NUM_RECIPES = 200
NUMBERS = (0, 1, 2, 0.1, 0.5, -1, 1e-3, 1e30, float("inf"), float("nan"), 10**30)
ODD: tuple[Any, ...] = (None, "", "x", True, [], {}, ["a"], {"a": 1}, "a\0b", ":", "m:f", "7")
CHOICES: dict[str, tuple[Any, ...]] = {
    "student.lora": (None, {"r": 2}, {"r": 2, "merge": True}, {"r": 0}, {"alpha": 1e9}),
    "data.template": ("auto", "none", "alpaca", "chat", "/nowhere/t.jinja"),
    "data.max_request_tokens": (1, 8, 24, 600),
    "data.max_response_tokens": (1, 2, 8, 600),
    "data.validation": ((), "valid.jsonl", "train.jsonl", "none.jsonl"),
    "sampling.temperature": (0, 0.1, 1, 100, 1e6),
    "sampling.top_p": (1e-9, 0.5, 1, 1.1),
    "sampling.top_k": (0, 1, 5, 10**9),
    "optimization.learning_rate": (0, 1e-4, 1.0),
    "optimization.teacher_learning_rate": (0, 1e-4, 1.0),
    "optimization.global_batch_size": (1, 2, 3, 13),
    "optimization.micro_batch_tokens": (None, 1, 64, 4096),
    "optimization.warmup_steps": (0, 1, 10**6),
    "optimization.schedule": ("constant", "linear", "cosine", "square"),
    "optimization.weight_decay": (0, 0.1, 10),
    "optimization.max_grad_norm": (1e-9, 1, 1e9),
    "optimization.teacher_step": ("before_student", "with_student"),
    "optimization.optimizer": ("adamw", "sgd"),
    "optimization.gradient_checkpointing": (True, False),
    "evaluation.every_steps": (0, 1, 5),
    "evaluation.metric": ("rouge_l", "exact_match", "cross_entropy", "reverse_kl_to_teacher"),
    "evaluation.num_examples": (1, 3),
    "evaluation.exposure_bias_every_steps": (0, 1),
    "checkpoints.every_steps": (1, 3),
    "seed": (0, 1, 2**32 - 1, 2**32, -1),
    "method.student_share": (0, 0.5, 1, 2),
    "method.divergence": ("forward_kl", "skew_forward_kl", "generalized_jsd", "nothing"),
    "method.skew": (0, 0.1, 1, -1),
    "method.beta": (0, 0.5, 1),
    "method.kl_share": (0, 0.5, 1, 2),
    "method.regularizer": (0, 1, -1),
    "method.length": (0, 1, 3, 1000),
    "method.teacher": ("frozen", "soft_prompt", "lora", "prefix", "text_prompt", "interpolated"),
    "method.teacher_options": ({}, {"r": 2}, {"length": 2}, {"momentum": 2}, {"seed": "x"}),
    "method.rollouts": ("student", "reference", "teacher", "mixture", "nobody"),
    "method.momentum": (0, 0.99, 2),
    "method.inner_epochs": (1, 2, 0),
}


def random_recipe(place: Path, dice: random.Random) -> dict[str, Any]:
    """A small recipe that works, with a method and up to three keys drawn at random."""
    raw = copy.deepcopy(tiny.recipe(place, method={"name": dice.choice([*METHODS])}))
    raw["optimization"] |= {"max_steps": 2, "global_batch_size": 2}
    raw["data"] |= {"max_response_tokens": 6, "validation": str(place / "valid.jsonl")}
    raw["evaluation"] = {"every_steps": 0, "metric": "cross_entropy", "num_examples": 2}
    options = inspect.signature(METHODS[raw["method"]["name"]]).parameters
    keys = [k for k in CHOICES if not k.startswith("method.") or k[7:] in options]
    for key in dice.sample(keys, dice.randint(0, 3)):
        values = CHOICES[key] if dice.random() < 0.8 else (*NUMBERS, *ODD)
        value = dice.choice(values)
        if isinstance(value, str) and value.endswith(".jsonl"):
            value = str(place / value)
        section, _, name = key.rpartition(".")
        target = raw.setdefault(section, {}) if section else raw
        target[name] = value
    return raw


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("random")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl", 12)
    tiny.write_data(directory / "valid.jsonl", 2)
    return directory


def test_random_recipes_take_two_steps_or_are_refused_with_a_sentence(place, tmp_path, capsys):
    dice = random.Random(0)
    outcomes = {"trained": 0, "refused": 0}
    for number in range(NUM_RECIPES):
        raw = random_recipe(place, dice) | {"output": str(tmp_path / f"run-{number}")}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        try:
            run = train(load_recipe(path))
        except UserError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"recipe {number} {raw} ends in {error!r}") from error
        else:
            assert (run / "summary.json").is_file(), raw
            outcomes["trained"] += 1
    assert min(outcomes.values()) > NUM_RECIPES / 5, outcomes
