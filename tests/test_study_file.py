"""The study file: what it may hold, and what is refused before anything is written."""

import re
from pathlib import Path

import pytest
import yaml

import runs
import tiny
from promptkd.errors import UserError
from promptkd.study.file import ScoringSection, Study, load_study, planned_runs, study_from_dict
from studies import raw_study, save_models_and_data, study, write


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return save_models_and_data(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"methods": {"kd": {"method": {"name": "kd"}}, "p": {"method": {"lenght": 3}}}},
            "methods.p: unknown key 'method.lenght'; did you mean 'length'?",
        ),
        (
            {"methods": {"kd": {"method": {"name": "kdd"}}}, "baseline": "start"},
            "methods.kd: unknown method 'kdd'; did you mean 'kd'?",
        ),
        (
            {"evaluation": {"suite": {"a": "/nowhere/a.jsonl"}}},
            "/nowhere/a.jsonl",
        ),
    ],
)
def test_a_study_that_cannot_work_writes_nothing(pair, tmp_path, changes, complaint):
    outcome = study(tmp_path, raw_study(pair, tmp_path / "study", **changes))

    assert outcome.status == 1
    assert complaint in outcome.stderr
    assert not (tmp_path / "study").exists()


def test_several_processes_are_told_how_to_share_a_study(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = study(tmp_path, raw_study(pair, tmp_path / "study"))

    assert outcome.status == 1
    assert f"beside its directory ({tmp_path}/study/LABEL/seed-N.yaml)" in outcome.stderr
    assert not (tmp_path / "study").exists()


def test_what_a_run_would_find_before_its_first_step_is_found_before_the_first_run(pair, tmp_path):
    raw = raw_study(pair, tmp_path / "study")
    raw["base"]["data"]["train"] = str(tiny.write_data(tmp_path / "t.jsonl", 4, with_output=False))
    raw["methods"] = dict(reversed(raw["methods"].items()))
    outcome = study(tmp_path, raw)

    assert outcome.status == 1
    assert "methods.kd: The method 'kd' learns from reference responses" in outcome.stderr
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"baseline": "gdk"}, "baseline is 'gdk'; did you mean 'gkd'?"),
        ({"baselin": "kd"}, "unknown key 'baselin'; did you mean 'baseline'?"),
        ({"seed": 1}, "unknown key 'seed'; did you mean 'seeds'?"),
        ({"seeds": [1, 1]}, "'seeds' is [1, 1]: a seed stands there twice"),
        ({"seeds": []}, "'seeds' is []: "),
        ({"seeds": [True]}, "'seeds.0' is True"),
        ({"results": ""}, "'results' is ''"),
        (
            {"evaluation": {"suite": {"a": [""]}}},
            "'evaluation.suite': 'a' is [''], which is no data",
        ),
        (
            {"evaluation": {"suite": {"a": "a"}, "num_exampels": 3}},
            "unknown key 'evaluation.num_exampels'; did you mean 'num_examples'?",
        ),
        ({"evaluation": {"suite": {"a": 3}}}, "'evaluation.suite': 'a' is 3, which is no data"),
        ({"evaluation": {"suite": {"a/b": "a"}}}, "'a/b' names files of scores"),
        ({"evaluation": {}}, "'evaluation.suite' is missing from the study file"),
        ({"methods": {"kd": {}}}, "'methods.kd.method' is missing"),
        ({"methods": {"teacher": {"method": {"name": "kd"}}}}, "can't have this label"),
        ({"methods": {"a/b": {"method": {"name": "kd"}}}}, "can't have this label"),
        (
            {"methods": {"kd": {"method": {"name": "kd"}, "optimization": {"lr": 1}}}},
            "unknown key 'methods.kd.optimization.lr'; did you mean 'learning_rate'?",
        ),
        (
            {"methods": {"kd": {"method": {"name": "kd"}, "seed": 1}}},
            "'methods.kd.seed': the study decides it, by its 'seeds'",
        ),
        (
            {"methods": {"kd": {"method": {"name": "kd"}, "student": {"model": "other"}}}},
            "'methods.kd.student.model' is 'other', the base's is ",
        ),
        ({"base": {"student": {"model": "s"}}}, "'base.data' is missing from the recipe"),
        ({"base": {"seed": 1}}, "'base.seed': the study decides it, by its 'seeds'"),
        ({"base": "none.yaml"}, "Recipe none.yaml: No such file"),
    ],
)
def test_a_wrong_study_file_is_refused_when_read(pair, changes, complaint):
    with pytest.raises(UserError) as refusal:
        study_from_dict(raw_study(pair, Path("study"), **changes))
    assert complaint in str(refusal.value)


# -- the study file


def test_a_base_may_be_a_recipe_file_and_methods_change_parts_of_it(pair, tmp_path):
    recipe = tiny.recipe(pair, method={"name": "sft"}, output="runs/sft", seed=9)
    (tmp_path / "suite.yaml").write_text("a: a.jsonl\n")
    raw = raw_study(pair, Path("runs/study"), base=runs.write_recipe(tmp_path, recipe))
    raw["evaluation"] = {"suite": str(tmp_path / "suite.yaml")}
    loaded = load_study(write(tmp_path, raw))

    planned = planned_runs(loaded)
    assert [run.name for run in planned] == [
        "kd, seed 0",
        "gkd, seed 0",
        "kd, seed 1",
        "gkd, seed 1",
    ]
    kd, gkd = planned[0].recipe, planned[1].recipe
    assert (gkd.method.name, gkd.seed, gkd.output) == ("gkd", 0, "runs/study/gkd/seed-0")
    assert (kd.optimization.learning_rate, gkd.optimization.learning_rate) == (1e-2, 0.1)
    assert gkd.optimization.max_steps == recipe["optimization"]["max_steps"]
    assert loaded.evaluation.seeds == (10, 20, 30, 40, 50)
    assert loaded.evaluation.suite == {"a": ["a.jsonl"]}


def test_the_study_page_shows_every_key_with_its_default():
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    (block,) = re.findall(r"(?ms)^```yaml study\n(.*?)^```$", page)
    written = yaml.safe_load(block)
    study_from_dict(written)
    assert written.keys() == Study.model_fields.keys()
    assert written["evaluation"].keys() == ScoringSection.model_fields.keys()
    free = {line.split(":")[0].strip() for line in block.splitlines() if "# example" in line}
    for section, model in ((written, Study), (written["evaluation"], ScoringSection)):
        for key, field in model.model_fields.items():
            if not field.is_required() and key not in free:
                value = section[key]
                assert (tuple(value) if isinstance(value, list) else value) == field.default, key
