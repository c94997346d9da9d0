"""Memory that is kept, and a micro-batch's budget when the recipe doesn't say."""

import json
import platform
import shutil
import subprocess
import sys

import pytest
import torch

import runs
import tiny
from promptkd.errors import UserError
from promptkd.ranks import Ranks
from promptkd.teachers import SoftPrompt
from promptkd.training.token_budget import (
    CEILINGS,
    Budget,
    bytes_per_token,
    free_memory,
    measured_budget,
    token_budget,
)

CPU = torch.device("cpu")


def model(num_layers, learns=True):
    module = tiny.model("llama", num_layers=num_layers, rows=128, seed=0)
    return tiny.language_model(module.requires_grad_(learns), 128)


def kept(speaker, model):
    return bytes_per_token(speaker.hidden_states, list(model.module.parameters()), CPU)


def test_every_layer_keeps_the_same_and_a_frozen_model_nothing():
    one, two, three = (kept(m, m) for m in map(model, (1, 2, 3)))

    assert three - two == two - one > 0
    assert kept(model(2, learns=False), model(2, learns=False)) == 0


def test_a_frozen_teacher_keeps_activations_once_its_soft_prompt_learns():
    frozen = model(2, learns=False)
    teacher = SoftPrompt(length=3, init="random").build(frozen, None)

    assert 0 < kept(teacher, frozen) < kept(model(2), model(2))


def test_the_budget_is_half_of_what_is_free_within_its_bounds():
    at = {"per_token": [1000], "reserved": 500_000, "longest": 100, "device": CPU}

    assert token_budget(free=2_500_000, **at) == Budget(1000, kept=1000)
    assert token_budget(free=4_500_000, **at) == Budget(2000, kept=2000)
    assert token_budget(free=10**12, **at).micro_batch == CEILINGS["cpu"]
    with pytest.raises(UserError, match="A sequence of 100 tokens does not fit"):
        token_budget(free=600_000, **at)


def test_the_larger_graph_decides_and_both_are_kept_where_the_sum_fits():
    at = {"reserved": 0, "longest": 100, "device": CPU}

    assert token_budget([1000, 3000], free=6_000_000, **at) == Budget(1000, kept=750)
    assert token_budget([4000], free=6_000_000, **at) == Budget(750, kept=750)


def test_the_rank_with_the_least_memory_decides(monkeypatch):
    class Others(Ranks):
        def gather(self, items):
            return [*items, 3_000_000]

    student = model(2)
    kept_by_student = kept(student, student)
    trained = sum(p.nbytes for p in student.module.parameters())
    budget = measured_budget(
        student, None, 10, together=False, ranks=Others(0, 2), say=lambda sentence: None
    )

    assert budget.micro_batch == int((3_000_000 - 3 * trained) / 2 / kept_by_student)


def test_some_memory_is_free():
    assert 0 < free_memory(CPU) < 2**50


def test_a_run_that_goes_on_keeps_the_budget_it_began_with(tmp_path, monkeypatch):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    raw = tiny.recipe(
        tmp_path,
        optimization={"micro_batch_tokens": None, "max_steps": 2},
        checkpoints={"every_steps": 1, "keep": 2},
    )
    with monkeypatch.context() as less:
        less.setitem(CEILINGS, "cpu", 90)
        run = runs.train(raw)
    whole, last = runs.result(run), run / "checkpoints" / "step-000002"
    shutil.rmtree(last)
    (run / "summary.json").unlink()
    runs.train(raw)

    assert json.loads((last / "progress.json").read_text())["step"]["micro_batch_tokens"] == 90
    assert runs.result(run) == whole


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc hands memory back")
def test_freed_memory_is_used_again_without_new_pages():
    """128 MiB in pieces of 16: from the fifth time on, into pages that the process still has."""
    program = """
import resource, torch
from promptkd.kernels.allocator import keep_freed_memory
keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.ones(2**22) for _ in range(8)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del pieces
print(faults * resource.getpagesize())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert int(result.stdout) < 0.2 * 2**27
