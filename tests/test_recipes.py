"""Every recipe is read, its method is built, and a run of it gets as far as its first step."""

from pathlib import Path

import pytest
import yaml

import tiny
from promptkd.config import load_recipe
from promptkd.methods import build_method
from promptkd.study.file import load_study, planned_runs
from promptkd.training.trainer import Trainer

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
STUDIES = sorted((RECIPES[0].parent / "studies").glob("*.yaml"))
PUBLISHED = {
    # updates, global batch and rates of the authors' scripts
    "gpt2-base": (880, 256, 5e-5),
    "gpt2-medium": (3560, 64, 1e-5),
    "gpt2-large": (2670, 64, 5e-6),
    "opt-1.3b": (1780, 64, 5e-6),
    "opt-2.7b": (1780, 64, 5e-6),
    "opt-6.7b": (1780, 64, 5e-6),
    "llama-7b": (1780, 64, 5e-6),
}
DOLLY_ROWS = 11_435


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_recipe_of_a_study_is_read_and_its_method_built(path):
    runs = planned_runs(load_study(path))
    assert runs
    for run in runs:
        build_method(run.recipe.method.name, **run.recipe.method.options)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A tiny pair with room for every recipe's lengths, and data with references."""
    directory = tmp_path_factory.mktemp("stand_ins")
    room = {"max_position_embeddings": 2048}
    tiny.save_pair(directory, student_options=room, teacher_options=room, chat_template=True)
    tiny.write_data(directory / "data.jsonl", 256)
    return directory


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_comes_through_the_preflight_with_tiny_models(path, stand_ins, tmp_path):
    overrides = [
        f"student.model={stand_ins / 'student'}",
        f"data.train={stand_ins / 'data.jsonl'}",
        f"data.validation={stand_ins / 'data.jsonl'}",
        f"output={tmp_path / 'run'}",
        "data.template_options={}",  # the real tokenizer's
        "sampling.engine=transformers",
    ]
    if load_recipe(path).teacher:
        overrides.append(f"teacher.model={stand_ins / 'teacher'}")
    recipe = load_recipe(path, overrides)
    method = build_method(recipe.method.name, **recipe.method.options)
    trainer = Trainer(recipe, method)
    assert trainer.parts.max_steps > 0
    assert (trainer.parts.models.teacher is not None) == method.needs_teacher


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_writes_to_the_run_of_its_own_name(path):
    assert load_recipe(path).output == f"runs/{path.stem}"


def test_there_is_a_recipe_for_every_published_pair():
    assert set(PUBLISHED) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_those_of_the_scripts(name):
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    optimization = recipe.optimization
    steps, batch, rate = PUBLISHED[name]
    assert (optimization.max_steps, optimization.global_batch_size) == (steps, batch)
    assert optimization.learning_rate == optimization.teacher_learning_rate == rate
    assert recipe.method.options == {
        "length": 7,
        "init_text": "Suppose you are a student.",
        "regularizer": 1.0,
    }
    epochs = steps / (DOLLY_ROWS // batch)
    assert epochs == {"gpt2-large": 15}.get(name, 20 if name.startswith("gpt2") else 10)


def test_baselines_of_a_pair_share_their_start_teacher_and_data():
    read = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES}
    ours = read["gpt2-base"]
    for name in ("gpt2-base-gkd", "gpt2-base-minillm", "gpt2-base-distillm"):
        for section in ("student", "teacher", "data", "sampling"):
            assert read[name][section] == ours[section], (name, section)
