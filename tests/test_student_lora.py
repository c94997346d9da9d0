"""A student that trains adapters: what learns, what is saved, what loads."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from promptkd.config import recipe_from_dict
from promptkd.methods import build_method
from promptkd.models.loading import load_model
from promptkd.training.trainer import Trainer

TOKENS = torch.randint(2, 98, (3, 9), generator=torch.Generator().manual_seed(3))


def trained(tmp_path, architecture="llama", output="run", **lora):
    if not (tmp_path / "student").exists():
        tiny.save_pair(tmp_path, architecture)
        tiny.write_data(tmp_path / "train.jsonl")
    start = {"model": str(tmp_path / "student"), "lora": {"r": 4, **lora}}
    recipe = recipe_from_dict(
        tiny.recipe(
            tmp_path,
            student=start,
            checkpoints={"every_steps": 1, "keep": 9},
            output=str(tmp_path / output),
        )
    )
    trainer = Trainer(recipe, build_method("promptkd"))
    trainer.run()
    return trainer


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("merge", [False, True])
def test_the_saved_student_says_what_the_trained_one_does(tmp_path, architecture, merge):
    own = trained(tmp_path, architecture, merge=merge).parts.models.student.module
    run = tmp_path / "run"
    for loaded in (
        load_model(str(run), torch.float32),
        AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32).eval(),
    ):
        torch.testing.assert_close(logits(loaded), logits(own), atol=1e-4, rtol=1e-4)
    start = load_model(str(tmp_path / "student"), torch.float32)
    assert (logits(start) - logits(own)).abs().max() > 0.01
    assert (run / "student" / "adapter_config.json").exists() != merge


def test_only_the_adapters_of_the_student_change_and_are_in_its_checkpoints(tmp_path):
    own = trained(tmp_path).parts.models.student.module
    start = load_file(tmp_path / "student" / "model.safetensors")
    state = own.state_dict()
    for name, value in start.items():
        base = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(state.get(name, state.get(base)), value), name
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-000003" / "student.pt")
    assert saved
    assert all("lora_" in name for name in saved)


def test_a_lora_run_goes_on_from_a_checkpoint_as_if_it_was_not_stopped(tmp_path):
    expected = trained(tmp_path).parts.models.student.module.state_dict()
    run = tmp_path / "run"
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    (run / "summary.json").unlink()
    again = trained(tmp_path).parts.models.student.module.state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_finished_lora_run_is_a_plain_model_to_start_from(tmp_path):
    trained(tmp_path)
    names = {
        name for name, _ in load_model(str(tmp_path / "run"), torch.float32).named_parameters()
    }
    plain = {
        name for name, _ in load_model(str(tmp_path / "student"), torch.float32).named_parameters()
    }
    assert names == plain
