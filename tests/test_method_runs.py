"""What a method is put together from, and what runs make of runs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from promptkd.api import train
from promptkd.composition import Method, Term
from promptkd.config import load_recipe, recipe_from_dict
from promptkd.errors import UserError
from promptkd.methods import METHODS, build_method, gkd, promptkd
from promptkd.objectives import Divergence
from promptkd.rollouts import Reference, Student
from promptkd.teachers import Frozen, SoftPrompt
from promptkd.training.trainer import Trainer


def test_distillm2_weighs_its_two_texts_by_beta():
    assert [term.weight for term in build_method("distillm2").terms] == [0.5, 0.5]
    assert [term.weight for term in build_method("distillm2", beta=1.5).terms] == [0.25, 0.75]


def test_a_teacher_that_learns_needs_a_method_that_moves_it():
    with pytest.raises(UserError, match="use promptkd"):
        build_method("gkd", teacher="lora")


def test_a_teacher_with_nothing_to_adapt_is_refused_by_promptkd():
    with pytest.raises(UserError, match="nothing to adapt; use gkd"):
        build_method("promptkd", teacher="text_prompt")


def test_teacher_options_reach_the_teacher_and_unknown_ones_name_their_neighbour():
    method = build_method("promptkd", teacher="lora", teacher_options={"r": 8})
    assert method.teacher.r == 8
    with pytest.raises(UserError, match=r"teacher_options\.alhpa.*did you mean 'alpha'"):
        build_method("promptkd", teacher="lora", teacher_options={"alhpa": 8})
    with pytest.raises(UserError, match="'frozen' has no options"):
        build_method("gkd", teacher_options={"r": 8})


def test_the_soft_prompts_options_reach_a_prefix_too():
    method = build_method("promptkd", teacher="prefix", length=3, init="padding")
    assert (method.teacher.length, method.teacher.init) == (3, "padding")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("minillm", {"corpus": "missing.txt"}, "missing.txt does not exist"),
        ("minillm", {"clip": 0.0}, "clip is 0.0"),
        ("distillm", {"capacity": 0}, "capacity is 0"),
        ("distillm", {"student_share": 1.5}, "student_share is 1.5"),
        ("taid", {"start": 0.9, "end": 0.5}, "0.9 to 0.5"),
        ("promptkd", {"init": "rand"}, "did you mean 'random'"),
        ("imitkd", {"start_share": -0.5}, "student_share is -0.5"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_when_read(name, options, said):
    with pytest.raises(UserError, match=said):
        build_method(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_two_builds_of_a_method_are_equal_and_say_the_same(name):
    assert build_method(name) == build_method(name)
    assert repr(build_method(name)) == repr(build_method(name))


def test_a_composition_of_ones_own_is_a_method():
    terms = (Term(Student(), Divergence("reverse_kl")), Term(Reference(), Divergence("forward_kl")))
    method = Method("mine", terms, Frozen())
    assert method.needs_references
    assert method.compares_tokens
    assert not method.needs_validation


def test_only_a_moved_teacher_may_learn():
    with pytest.raises(ValueError, match="nothing here moves"):
        Method("mine", (Term(Student(), Divergence("reverse_kl")),), SoftPrompt())


def test_a_method_keeps_what_it_was_called_with():
    method = gkd(0.5, divergence="generalized_jsd", beta=0.1)

    assert method.options == {"student_share": 0.5, "divergence": "generalized_jsd", "beta": 0.1}
    assert build_method(method.name, **method.options) == method


def test_the_recipe_of_a_run_made_in_python_makes_the_same_run_again(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    recipe = tiny.recipe(tmp_path)
    method = promptkd(length=3, regularizer=0.5)
    section = {"name": method.name, **method.options}
    first = train(recipe_from_dict(recipe | {"method": section}), method)
    again = train(load_recipe(first / "recipe.yaml", [f"output={tmp_path / 'again'}"]))

    assert runs.result(again) == runs.result(first)


def run(recipe):
    section = recipe_from_dict(recipe).method
    trainer = Trainer(recipe_from_dict(recipe), build_method(section.name, **section.options))
    trainer.run()
    return trainer


def test_minillm_with_a_corpus_goes_on_where_it_stopped(tmp_path):
    """Every method without one: ``test_contract.py``."""
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    (tmp_path / "corpus.txt").write_text("a b c d\nonce upon a time\nx\n")
    corpus = str(tmp_path / "corpus.txt")
    recipe = tiny.recipe(
        tmp_path,
        method={"name": "minillm", "inner_epochs": 2, "corpus": corpus},
        data={"max_response_tokens": 6},
        optimization={"max_steps": 5},
        checkpoints={"every_steps": 1, "keep": 9},
    )
    run(recipe)
    output = tmp_path / "run"
    expected = runs.result(output)
    for step in (3, 4, 5):
        shutil.rmtree(output / "checkpoints" / f"step-{step:06d}")
    (output / "summary.json").unlink()
    run(recipe)
    assert runs.result(output) == expected


def test_an_interpolated_teacher_leaves_no_adapter_behind(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    run(tiny.recipe(tmp_path, method={"name": "taid"}))
    assert not (tmp_path / "run" / "teacher_adapter").exists()


def test_a_finished_run_is_the_start_and_the_teacher_of_the_next(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    first = runs.train(tiny.recipe(tmp_path, method={"name": "sft"}, output=str(tmp_path / "a")))

    def chained(run: Path, output: str, **names: str) -> dict[str, torch.Tensor]:
        overrides = {who: {"model": str(run / name)} for who, name in names.items()}
        raw = tiny.recipe(tmp_path, output=str(tmp_path / output), **overrides)
        return load_file(runs.train(raw) / "student" / "model.safetensors")

    started = chained(first, "b", student=".")
    expected = chained(first, "c", student="student")
    torch.testing.assert_close(started, expected, rtol=0, atol=0)
    taught = chained(first, "d", teacher=".")
    expected = chained(first, "e", teacher="student")
    torch.testing.assert_close(taught, expected, rtol=0, atol=0)
    assert any(not torch.equal(taught[name], started[name]) for name in taught)
