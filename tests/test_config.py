"""A recipe is checked when read: an unknown key gets a suggestion, a wrong value a reason."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import tiny
from promptkd.config import Recipe, load_recipe, recipe_from_dict
from promptkd.errors import UserError
from promptkd.methods import build_method


def write(directory: Path, **overrides) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe(directory, **overrides)))
    return path


def value(recipe: Recipe, dotted: str):
    found = recipe.to_dict()
    for part in dotted.split("."):
        found = found[part]
    return found


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optimization.learning_rate=5e-5", "optimization.learning_rate", 5e-5),
        ("optimization.learning_rate=3", "optimization.learning_rate", 3.0),
        ("seed=7", "seed", 7),
        ("output=runs/a=b", "output", "runs/a=b"),
        ("data.train=[a.jsonl, b.jsonl]", "data.train", ["a.jsonl", "b.jsonl"]),
        ("data.validation=v.jsonl", "data.validation", ["v.jsonl"]),
        ("tracking=[tensorboard]", "tracking", ["tensorboard"]),
        ("optimization.gradient_checkpointing=true", "optimization.gradient_checkpointing", True),
        ("method.length=3", "method.length", 3),
        ("method.regularizer=1e-1", "method.regularizer", 0.1),
        ("evaluation={every_steps: 5}", "evaluation.every_steps", 5),
    ],
)
def test_an_override_sets_one_key_to_a_yaml_value(tmp_path, override, key, expected):
    plain = load_recipe(write(tmp_path))
    found = load_recipe(write(tmp_path), [override])

    assert value(found, key) == expected
    assert type(value(found, key)) is type(expected)
    assert key == "seed" or found.seed == plain.seed


def test_an_override_may_add_a_section_that_the_file_lacks(tmp_path):
    recipe = load_recipe(write(tmp_path), ["sampling.top_k=5", "sampling.temperature=0"])

    assert (recipe.sampling.top_k, recipe.sampling.temperature) == (5, 0.0)


def test_numbers_without_a_decimal_point_are_numbers_in_the_file_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    raw = yaml.safe_dump(tiny.recipe(tmp_path, method={"name": "promptkd", "regularizer": "X"}))
    path.write_text(raw.replace("regularizer: X", "regularizer: 1e-1"))

    assert load_recipe(path).method.options == {"regularizer": 0.1}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        (
            "optimization.learning_rat=1",
            "'optimization.learning_rat'; did you mean 'learning_rate'",
        ),
        ("optimization.lr=1", "'optimization.lr'; did you mean 'learning_rate'"),
        ("lr=1", "'lr'; did you mean 'learning_rate'"),
        ("lmbda=0.5", "'lmbda'; did you mean 'student_share'"),
        ("batch_size=8", "'batch_size'; did you mean 'global_batch_size'"),
        ("max_new_tokens=8", "'max_new_tokens'; did you mean 'max_response_tokens'"),
        ("data.max_prompt_length=8", "'data.max_prompt_length'; did you mean 'max_request_tokens'"),
        ("eval_steps=8", "'eval_steps'; did you mean 'evaluation.every_steps'"),
        ("outptu=x", "'outptu'; did you mean 'output'"),
        ("teacher.modle=x", "'teacher.modle'; did you mean 'model'"),
        ("checkpoints.zzz=1", "'checkpoints.zzz'; known: every_steps, keep"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, override, suggestion):
    with pytest.raises(UserError) as refusal:
        load_recipe(write(tmp_path), [override])
    assert f"unknown key {suggestion}" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "option", "suggestion"),
    [
        ("gkd", "lmbda", "student_share"),
        ("promptkd", "lenght", "length"),
        ("kd", "kl_shar", "kl_share"),
    ],
)
def test_an_unknown_method_option_is_refused_with_the_nearest_one(name, option, suggestion):
    with pytest.raises(UserError, match=f"'method.{option}'; did you mean '{suggestion}'"):
        build_method(name, **{option: 1})


def test_an_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="unknown method 'promtkd'; did you mean 'promptkd'"):
        build_method("promtkd")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("optimization.learning_rate=-1", "'optimization.learning_rate' is -1: "),
        ("optimization.learning_rate=fast", "'optimization.learning_rate' is 'fast': "),
        ("optimization.epochs=2", "max_steps is 3 and epochs is 2.0: give exactly one"),
        ("optimization.max_steps=null", "max_steps is None and epochs is None: give exactly one"),
        ("optimization.optimizer=adam", "'optimization.optimizer' is 'adam': "),
        ("sampling.top_p=0", "'sampling.top_p' is 0: "),
        ("data.max_request_tokens=0", "'data.max_request_tokens' is 0: "),
        ("precision=fp8", "'precision' is 'fp8': "),
        ("student=gpt2", "'student' is 'gpt2': "),
        ("output=null", "'output' is None: "),
        ("seed", "Override 'seed' has no '='"),
        ("output.name=x", "'output' is a value, not a section"),
        ("seed=[1,", "Override 'seed=[1,' is not valid YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(tmp_path, override, complaint):
    with pytest.raises(UserError) as refusal:
        load_recipe(write(tmp_path), [override])
    assert complaint in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"seed: [1,", "is not valid YAML"),
        (b"", "holds no keys"),
        (b"- seed", "holds no keys"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)

    with pytest.raises(UserError, match=rf"recipe\.yaml {complaint}"):
        load_recipe(path)


def test_a_missing_recipe_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load_recipe(tmp_path)


def test_every_fault_of_a_recipe_is_named_at_once():
    with pytest.raises(UserError) as refusal:
        recipe_from_dict({"student": {"model": "a"}, "optimization": {"max_steps": 1}, "sed": 1})
    assert str(refusal.value).splitlines() == [
        "'data' is missing from the recipe.",
        "'output' is missing from the recipe.",
        "unknown key 'sed'; did you mean 'seed'?",
    ]


def test_the_defaults_are_those_of_the_published_gpt2_base_run(tmp_path):
    raw = {
        "student": {"model": "s"},
        "data": {"train": "t.jsonl"},
        "optimization": {"max_steps": 1},
        "output": "o",
    }
    recipe = recipe_from_dict(raw)

    assert recipe.method.name == "promptkd"
    assert (recipe.data.max_request_tokens, recipe.data.max_response_tokens) == (256, 256)
    assert recipe.data.template == "auto"  # GPT-2 has no chat template: alpaca
    assert recipe.optimization.learning_rate == recipe.optimization.teacher_learning_rate == 5e-5
    assert (recipe.optimization.weight_decay, recipe.optimization.max_grad_norm) == (0.01, 1.0)
    assert recipe.optimization.teacher_step == "before_student"
    assert (recipe.sampling.temperature, recipe.sampling.top_p, recipe.sampling.top_k) == (1, 1, 0)
    assert recipe.evaluation.metric == "rouge_l"
    specification = build_method("promptkd").teacher
    assert (specification.length, specification.init_text) == (7, "Suppose you are a student.")


def test_a_recipe_is_read_back_from_its_own_yaml_unchanged(tmp_path):
    recipe = load_recipe(write(tmp_path), ["method.length=3", "optimization.learning_rate=1e-7"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())

    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_recipe_cannot_be_changed_after_it_was_read(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(write(tmp_path)).seed = 1


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("kd", {"kl_share": 2.0}, "kl_share is 2.0: a share lies in"),
        ("gkd", {"student_share": -0.5}, "student_share is -0.5: a probability lies in"),
        ("gkd", {"sft_share": 1.0}, "sft_share is 1.0: a share lies in"),
        ("promptkd", {"rollouts": "studnet"}, "rollouts is 'studnet'; did you mean 'student'"),
        ("promptkd", {"teacher": "softprompt"}, "'softprompt'; did you mean 'soft_prompt'"),
        ("promptkd", {"length": 0}, "length is 0: "),
        (
            "promptkd",
            {"length": "seven"},
            "'method.length' is 'seven': Input should be a valid int",
        ),
        ("minillm", {"clip": [0.2]}, r"'method.clip' is \[0.2\]: Input should be a valid number"),
        ("minillm", {"clip": 1.0}, "clip is 1.0: ratios are kept within"),
        ("minillm", {"clip": -0.1}, "clip is -0.1: ratios are kept within"),
        ("minillm", {"teacher_share": 1.0}, "teacher_share is 1.0: it lies in"),
        ("minillm", {"teacher_share": -0.1}, "teacher_share is -0.1: it lies in"),
        ("minillm", {"inner_epochs": 0}, "inner_epochs is 0: rollouts serve at least one"),
        ("promptkd", {"rollouts": "mixture", "student_share": 1.5}, "student_share is 1.5"),
        ("distillm2", {"beta": 2.5}, "beta is 2.5: the weights"),
        ("nowhere:mine", {}, "cannot be imported"),
        ("platform:node", {}, "returned str, not a promptkd Method"),
    ],
)
def test_a_method_option_out_of_range_is_refused(name, options, complaint):
    with pytest.raises(UserError, match=complaint):
        build_method(name, **options)


def test_reading_a_recipe_and_the_command_line_imports_no_torch():
    code = (
        "import sys, promptkd, promptkd.config, promptkd.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (result.stdout.strip(), result.stderr) == ("[]", "")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=-1", "'seed' is -1: Input should be greater than or equal to 0"),
        ("seed=true", "'seed' is True: a number is expected, not true or false"),
        ("optimization.max_grad_norm=.inf", "is inf: Input should be a finite number"),
        ("optimization.learning_rate=.nan", "is nan: Input should be a finite number"),
        ("sampling.temperature=.inf", "is inf: Input should be a finite number"),
        ('teacher.system="a\\ud800"', "'teacher.system' is 'a\\ud800': it holds half of a char"),
        ('teacher.context_template="{{ request }}\\udfff"', "it holds half of a character"),
        ("output=''", "'output' is '': String should have at least 1 character"),
        ('output="a\\0b"', "a text without NUL characters is expected"),
        ("data.train=[]", "'data.train' is []: Tuple should have at least 1 item"),
        ("optimization.epochs=1", "'optimization': max_steps is 3 and epochs is 1.0: give exactly"),
        ("seed=2024-13-45", "not valid YAML: month must be in 1..12"),
    ],
)
def test_a_value_out_of_any_sane_range_is_refused_by_name(tmp_path, override, said):
    with pytest.raises(UserError) as refused:
        load_recipe(write(tmp_path), [override])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
        (b"data: {train: a, train: b}\n", "the key 'train' is given twice"),
        (b"[" * 5000, "is nested too deeply"),
        (b"1: 2\n", "the key 1 is no text"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_reason(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_bytes(text)
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (":", {}, "method ':' has not the form module:function"),
        ("promptkd", {"regularizer": -1}, "regularizer is -1.0: finite and not negative"),
        ("promptkd", {"length": True}, "'method.length' is True: a number is expected"),
        ("taid", {"momentum": 2}, "momentum is 2.0"),
        ("taid", {"step_size": float("nan")}, "'method.step_size' is nan"),
        ("gkd", {"beta": 0.5}, "divergence 'reverse_kl' takes no options, but 'beta' is given"),
        ("distillm", {"skew": 1}, "skew is 1.0: it lies in [0, 1)"),
        ("akl", {"head_mass": 3}, "head_mass is 3.0"),
        ("abkd", {"alpha": 0, "beta": 0}, "alpha is 0.0 and beta 0.0"),
        ("promptkd", {"teacher": "lora", "teacher_options": {"r": 0}}, "r is 0 and alpha 32"),
        ("promptkd", {"teacher": "lora", "teacher_options": {"alpha": 10**9}}, "alpha 1000000000"),
        ("promptkd", {"init_text": "a\ud800"}, "'method.init_text' is 'a\\ud800': it holds half"),
        (
            "promptkd",
            {"teacher_options": {"init_text": "\ud800"}},
            "'teacher_options.init_text' is '\\ud800': it holds half of a character",
        ),
        ("gkd", {"divergence": "m:"}, "divergence 'm:' has not the form module:function"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value(name, options, said):
    with pytest.raises(UserError) as refused:
        build_method(name, **options)
    assert said in str(refused.value)
