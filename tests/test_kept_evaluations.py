"""An evaluation isn't made twice, and nothing that is no evaluation is replaced by one."""

import json
import shutil

import pytest

import tiny
from promptkd.errors import UserError
from promptkd.evaluation import evaluate as module
from promptkd.evaluation.evaluate import evaluate
from promptkd.evaluation.metrics import score_text

ASKED = {"seeds": (1,), "template": "none", "max_response_tokens": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("kept")
    student, _ = tiny.save_pair(place)
    data = tiny.write_data(place / "d.jsonl", 3)
    return student, data, evaluate(str(student), str(data), output=place / "scores", **ASKED)


@pytest.fixture
def again(made, tmp_path, monkeypatch):
    """A copy of the model, the data and the scores; evaluates it where loading is counted."""
    student, data, first = made
    own = tmp_path / "scores"
    shutil.copytree(student.parent / "scores", own)
    loaded = []
    load = module.load_pair
    monkeypatch.setattr(module, "load_pair", lambda *a: loaded.append(a) or load(*a))

    def evaluated(**changes):
        found = evaluate(str(student), str(data), output=own, **{**ASKED, **changes})
        return found == first, len(loaded)

    return evaluated, own, student, data


def test_what_is_there_is_neither_loaded_nor_scored_anew(again):
    assert again[0]() == (True, 0)


@pytest.mark.parametrize(
    "changes", [{"seeds": (2,)}, {"max_response_tokens": 5}, {"metrics": ["final_answer"]}]
)
def test_what_is_asked_otherwise_is_scored(again, changes):
    assert again[0](**changes) == (False, 1)


def test_other_rows_other_weights_and_lost_responses_are_scored(again):
    evaluated, own, student, data = again
    for number, path in enumerate((data, student / "config.json"), 1):
        kept = path.read_text()
        path.write_text(kept.replace("say 0", "ask 0") + "\n")
        assert evaluated()[1] == number
        path.write_text(kept)
    shutil.rmtree(own)
    own.mkdir()
    assert evaluated()[1] == 3


def test_a_smaller_evaluation_is_refused_before_a_model_is_loaded(again, monkeypatch):
    monkeypatch.setattr(module, "load_pair", None)
    with pytest.raises(UserError, match="would replace a larger one"):
        again[0](num_examples=2)


@pytest.mark.parametrize("name", ["a b", "nobody/nothing"])
def test_a_name_that_is_no_models_is_said_in_a_sentence(made, tmp_path, name):
    with pytest.raises(UserError, match="is not a model that can be loaded"):
        evaluate(name, str(made[1]), output=tmp_path, **ASKED)


def test_a_file_that_is_no_evaluation_is_never_replaced(made, tmp_path):
    student, data, _ = made
    shutil.copytree(student, tmp_path / "model")
    named = {"config": str(data)}
    with pytest.raises(
        UserError, match=r"config\.json is no evaluation .* name the data otherwise"
    ):
        evaluate(str(student), named, output=tmp_path / "model", **ASKED)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "llama"


ODD = {
    "true": "return True",
    "text": "return '3'",
    "many": "return [1]",
    "quits": "raise SystemExit(3)",
}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("true", "returned True, a bool. Return a number .100.0"),
        ("text", "returned '3', a str"),
        ("many", "returned .1., a list"),
        ("quits", "raised SystemExit: 3. Mend it"),
    ],
)
def test_a_metric_that_returns_no_number(tmp_path, monkeypatch, name, complaint):
    bodies = "".join(f"def {name}(r, f, e):\n    {body}\n" for name, body in ODD.items())
    (tmp_path / "odd_metrics.py").write_text(bodies)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=complaint):
        score_text([f"odd_metrics:{name}"], "x", ["x"], {"index": 0})


def test_a_module_that_ends_the_process_when_imported(tmp_path, monkeypatch):
    (tmp_path / "quitting_metrics.py").write_text("import sys\nsys.exit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="'quitting_metrics:f' cannot be imported: 4"):
        score_text(["quitting_metrics:f"], "x", ["x"], {"index": 0})
