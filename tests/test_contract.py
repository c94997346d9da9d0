"""Every method keeps the same promises; what differs between models, on every architecture."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from promptkd.api import train
from promptkd.config import recipe_from_dict
from promptkd.methods import METHODS, build_method
from promptkd.rollouts import Source
from promptkd.training.checkpoints import saved_checkpoints
from promptkd.training.trainer import Trainer

OPTIONS = {
    "kd": {"kl_share": 0.5},
    "imitkd": {"start_share": 0.5},
    "distillm": {"student_share": 1.0, "capacity": 1},
    "minillm": {"inner_epochs": 3},
    "taid": {"step_size": 1.0, "momentum": 0.5},
}
"""Options under which a short run shows more of a method than its defaults do."""

VARIANTS = {
    "promptkd_with_lora": {"name": "promptkd", "teacher": "lora"},
    "promptkd_with_prefix": {"name": "promptkd", "teacher": "prefix"},
    "gkd_with_text_prompt": {"name": "gkd", "teacher": "text_prompt"},
}

EVERYWHERE = ("promptkd", *VARIANTS, "minillm", "taid", "sdft")
"""Every kind of teacher and of author, which meet the architecture; other methods differ in what
is done with log-probabilities."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    made = {}
    for architecture in tiny.ARCHITECTURES:
        directory = tmp_path_factory.mktemp(architecture)
        tiny.save_pair(
            directory,
            architecture,
            student_options={"num_layers": 1},
            teacher_options={"num_layers": 2, "rows": 128},
        )
        tiny.write_data(directory / "train.jsonl", 8)
        tiny.write_data(directory / "validation.jsonl", 2)
        made[architecture] = directory
    return made


def recipe(directory, output, method, max_steps=2, **overrides):
    """A short run; its validation loss steers the methods that ask for it."""
    data = {"max_response_tokens": 8}
    built = build_method(**method)
    if built.needs_validation:
        data["validation"] = str(directory / "validation.jsonl")
    if built.needs_context:
        overrides["teacher"] = {"context_template": "{{ request }} ~ {{ response }}"}
    raw = tiny.recipe(
        directory,
        method=method,
        data=data,
        optimization={"global_batch_size": 2, "max_steps": max_steps, "micro_batch_tokens": 40},
        evaluation={"every_steps": 1, "metric": "cross_entropy"},
        output=str(output),
        **overrides,
    )
    return recipe_from_dict(raw)


def run(directory, output, method, **options):
    made = recipe(directory, output, method, **options)
    trainer = Trainer(made, build_method(**method))
    trainer.run()
    return trainer


def steps(output):
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def student(output):
    return load_file(output / "student/model.safetensors")


def options_of(name):
    return VARIANTS.get(name, {"name": name, **OPTIONS.get(name, {})})


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (name, architecture)
        for name in [*METHODS, *VARIANTS]
        for architecture in (tiny.ARCHITECTURES if name in EVERYWHERE else ("gpt2", "llama"))
    ],
)
def test_method_moves_the_student_and_leaves_the_teachers_weights_alone(
    pairs, tmp_path, name, architecture
):
    trainer = run(pairs[architecture], tmp_path / "run", options_of(name))
    rows = steps(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        numbers = [v for k, v in row.items() if k == "loss" or k.startswith(("kl_", "gradient_"))]
        assert all(map(math.isfinite, numbers))
        assert row["gradient_norm_student"] > 0

    if trainer.parts.models.teacher:
        module = trainer.parts.models.teacher.model.module
        found = {name.replace("base_layer.", ""): p for name, p in module.named_parameters()}
        for name, value in tiny.model(architecture, rows=128, seed=2).named_parameters():
            assert torch.equal(found[name], value), name

    before = tiny.model(architecture, num_layers=1, seed=1).state_dict()
    after = student(tmp_path / "run")
    assert after
    for name, value in after.items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a != "llama"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(pairs, tmp_path, architecture):
    """On llama, for every method, a run that was stopped equals one that wasn't, below."""
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        train(recipe(pairs[architecture], output, options_of("promptkd")))
    assert [row["loss"] for row in steps(first)] == [row["loss"] for row in steps(second)]
    for key, value in student(first).items():
        assert torch.equal(student(second)[key], value), key


@pytest.mark.parametrize("name", ["promptkd", "distillm", "minillm"])
def test_another_seed_gives_another_run(pairs, tmp_path, name):
    for seed in (0, 1):
        train(recipe(pairs["llama"], tmp_path / str(seed), options_of(name), seed=seed))
    losses = [[row["loss"] for row in steps(tmp_path / str(seed))] for seed in (0, 1)]
    assert losses[0] != losses[1]


class Killed(Exception):
    """The process ends here."""


@dataclass(frozen=True)
class KilledOnce:
    """Another source that dies in the fourth step, unless it left its mark already."""

    source: Source
    mark: str

    @property
    def needs_references(self):
        return self.source.needs_references

    @property
    def asks_teacher(self):
        return self.source.asks_teacher

    @property
    def needs_validation(self):
        return self.source.needs_validation

    def asks_student(self, batch, generators, state):
        return self.source.asks_student(batch, generators, state)

    def generate(self, batch, generators, state):
        if generators.step == 3 and not Path(self.mark).exists():
            Path(self.mark).touch()
            raise Killed
        return self.source.generate(batch, generators, state)

    def observe(self, validation_loss, state):
        self.source.observe(validation_loss, state)


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(pairs, tmp_path, name):
    options = {"max_steps": 4, "checkpoints": {"every_steps": 2}}
    mark = tmp_path / "killed"
    method = build_method(**options_of(name))
    first, *rest = method.terms
    killed = replace(first, rollouts=KilledOnce(first.rollouts, str(mark)))
    method = replace(method, terms=(killed, *rest))

    mark.touch()
    train(recipe(pairs["llama"], tmp_path / "whole", options_of(name), **options), method)
    mark.unlink()
    stopped = recipe(pairs["llama"], tmp_path / "stopped", options_of(name), **options)
    with pytest.raises(Killed):
        train(stopped, method)
    saved = saved_checkpoints(tmp_path / "stopped/checkpoints")
    assert [path.name for path in saved] == ["step-000002"]
    assert len(steps(tmp_path / "stopped")) == 3  # one step is lost and done again
    train(stopped, method)

    whole, resumed = steps(tmp_path / "whole"), steps(tmp_path / "stopped")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    for row, again in zip(whole, resumed, strict=True):
        assert runs.timeless(row) == runs.timeless(again)
    for file in ("student/model.safetensors", "teacher_adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).exists() == (tmp_path / "stopped" / file).exists()
        if (tmp_path / "whole" / file).exists():
            actual = load_file(tmp_path / "stopped" / file)
            for key, value in load_file(tmp_path / "whole" / file).items():
                assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("name", METHODS)
def test_method_is_documented_and_carries_its_name(name):
    assert METHODS[name].__doc__
    assert build_method(name).name == name


def test_the_teachers_divergence_is_a_mean_over_the_tokens_compared_with_it(pairs, tmp_path):
    alone = build_method("promptkd", rollouts="reference")
    both = replace(alone, terms=(*alone.terms, *build_method("sft").terms))
    logged = []
    for method in (alone, both):
        made = recipe(pairs["llama"], tmp_path / str(len(method.terms)), {"name": "promptkd"})
        logged.append(steps(train(made, method))[0])
    for key in ("kl_teacher_student", "kl_teacher_plain"):
        assert logged[1][key] == pytest.approx(logged[0][key], rel=1e-5)
    assert logged[1]["loss"] > logged[0]["loss"]
