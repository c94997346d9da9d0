"""Writing with adapters, and what hooks around methods promise."""

import json

import pytest
import torch

import tiny
from promptkd.adapters import Prefix
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation.side_by_side import generate
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.methods import build_method
from promptkd.teachers import TextPrompt
from promptkd.training.trainer import Trainer

TEXT = "Suppose you are a student."
REQUESTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]


def frozen(architecture):
    return tiny.language_model(tiny.model(architecture, num_layers=3, seed=2), tiny.ROWS)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_writing_after_a_prefix_is_writing_after_its_text(architecture):
    tokenizer = tiny.tokenizer()
    length = len(tokenizer(TEXT).input_ids)
    model = frozen(architecture)
    prefix = Prefix(length=length).build(model, tokenizer)
    prompt = TextPrompt(TEXT).build(model, tokenizer).soft_prompt
    engine = TransformersEngine(model, [0])
    seeds, decoding = [(1,), (2,), (3,)], GenerationSettings(12)
    written = engine.generate(REQUESTS, seeds, decoding, prefix=prefix)
    assert written == engine.generate(REQUESTS, seeds, decoding, soft_prompt=prompt)
    assert written != engine.generate(REQUESTS, seeds, decoding)


@pytest.mark.parametrize("teacher", ["soft_prompt", "lora", "prefix"])
def test_generation_lets_every_adapted_teacher_speak(teacher, tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    recipe = tiny.recipe(
        tmp_path,
        method={"name": "promptkd", "teacher": teacher},
        optimization={"teacher_learning_rate": 0.3},
    )
    trainer = Trainer(recipe_from_dict(recipe), build_method("promptkd", teacher=teacher))
    trainer.run()
    said = generate(tmp_path / "run", "say 1", seed=0, temperature=0.0)
    ids = list(trainer.parts.requests.tokenizer("say 1").input_ids)
    adapted, expected = trainer.parts.models.teacher, []
    for _ in range(24):  # token by token from whole passes
        hidden = adapted.hidden_states(torch.tensor([ids + expected]))[:, -1]
        token = adapted.model.head.logprobs(hidden).argmax().item()
        expected.append(token)
        if token == 0:
            break
    text = trainer.parts.requests.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert said["adapted teacher"] == text
    assert said["adapted teacher"] != said["teacher"]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(architecture, tmp_path):
    tiny.save_pair(tmp_path, architecture)
    tiny.write_data(tmp_path / "train.jsonl")
    losses = []
    for checkpointing in ((), ("optimization",), ("optimization", "teacher")):
        output = tmp_path / f"run{len(checkpointing)}"
        recipe = tiny.recipe(tmp_path, output=str(output))
        for section in checkpointing:
            recipe[section]["gradient_checkpointing"] = True
        Trainer(recipe_from_dict(recipe), build_method("promptkd")).run()
        rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_a_checkpointed_teacher_that_reads_a_prefix_is_refused(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    recipe = recipe_from_dict(
        tiny.recipe(tmp_path, teacher={"gradient_checkpointing": True}, method={"name": "promptkd"})
    )
    with pytest.raises(UserError, match=r"teacher.gradient_checkpointing is true, .* a prefix"):
        Trainer(recipe, build_method("promptkd", teacher="prefix"))


def test_a_method_steered_by_validation_is_refused_without_it(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    recipe = recipe_from_dict(tiny.recipe(tmp_path, method={"name": "distillm"}))
    with pytest.raises(UserError, match="steered by the validation loss"):
        Trainer(recipe, build_method("distillm"))


def test_a_prefix_counts_among_the_positions_of_the_teacher(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    sizes = {"max_request_tokens": 256, "max_response_tokens": 256}
    recipe = recipe_from_dict(tiny.recipe(tmp_path, data=sizes))
    with pytest.raises(UserError, match="7 soft-prompt vectors"):
        Trainer(recipe, build_method("promptkd", teacher="prefix"))


def test_the_loss_of_two_terms_is_their_weighed_sum(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    logged = []
    for beta in (0.0, 2.0, 0.5):
        output = tmp_path / f"run{beta}"
        recipe = tiny.recipe(tmp_path, output=str(output), optimization={"max_steps": 1})
        Trainer(recipe_from_dict(recipe), build_method("distillm2", beta=beta)).run()
        logged.append(json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    first, second, mixed = logged
    assert mixed == pytest.approx(0.75 * first + 0.25 * second, rel=1e-5)


def test_a_method_that_needs_only_texts_takes_a_teacher_with_another_tokenizer(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    recipe = recipe_from_dict(tiny.recipe(tmp_path, method={"name": "seqkd"}))
    trainer = Trainer(recipe, build_method("seqkd"))
    assert "teacher_mass_outside" not in trainer.parts.found
    trainer.run()
