"""Compiled kernels equal plain ones: losses, weights and soft prompt, step by step.

The compiler's own way through a step is checked (``aot_eager`` traces it, and computes the traced
operations one by one); layers and losses are also compiled whole, by g++.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.kernels import compiled, prepare

PROGRAM = Path(__file__).with_name("compiled_steps.py")
TRACED = (
    "promptkd",
    "with_student",
    "gkd",
    "sft",
    "taid",
    "own",
    "checkpointing",
    "padded",
    "lora",
    "lora teacher",
)
CODE = ("sft", "losses")  # the student's layers, and all losses of student and teacher


def beside(backend, device, *cases):
    """What ``compiled_steps.py`` finds, in a process whose calls aren't checked."""
    command = [sys.executable, str(PROGRAM), backend, device, *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def traced():
    return beside("aot_eager", "cpu", *TRACED)


@pytest.fixture(scope="module")
def built():
    return beside("inductor", "cpu", *CODE)


@pytest.mark.parametrize("case", TRACED)
def test_losses_and_gradients_are_those_of_plain_kernels(traced, case):
    assert traced[case]["nats"] < 1e-5
    assert traced[case]["moved"] < 1e-5


@pytest.mark.parametrize("case", TRACED)
def test_nothing_is_compiled_after_the_second_step(traced, case):
    first, _, *later = traced[case]["compiled"]
    assert first > 0
    assert later == [0]


@pytest.mark.parametrize("case", CODE)
def test_what_the_c_compiler_makes_of_them_is_equal_too(built, case):
    assert built[case]["nats"] < 1e-5
    assert built[case]["moved"] < 1e-5


def test_names_of_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    module = tiny.model("llama")
    before = set(module.state_dict())
    prepare(module, torch.device("cpu"), compiled=True)

    assert set(module.state_dict()) == before


def test_a_machine_without_a_compiler_is_told_so():
    code = (
        "import tiny; from promptkd import kernels, errors; import torch\n"
        "try: kernels.prepare(tiny.model('llama'), torch.device('cpu'), compiled=True)\n"
        "except errors.UserError as error: print(error)"
    )
    own = {"CXX": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("kernels is compiled, but nothing can be compiled for the device")
    assert done.stdout.strip().endswith("or set kernels: plain.")


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ({"sharding": "fsdp"}, "sharding: fsdp and kernels: compiled"),
        ({"teacher": {"quantization": "8bit"}}, "kernels: compiled and teacher.quantization"),
        ({"teacher": {"offload": True}}, "kernels: compiled and teacher.offload"),
    ],
)
def test_what_was_not_tried_together_is_refused(tmp_path, key, other):
    with pytest.raises(UserError, match=f"{other} don't go together"):
        recipe_from_dict(tiny.recipe(tmp_path, kernels="compiled", **key))
