"""The model card: hubs can read it, its snippet runs from anywhere, it names no private path."""

import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import (
    eval_results_to_model_index,
    model_index_to_eval_results,
)
from peft import AutoPeftModelForCausalLM

import runs
import tiny
from promptkd.evaluation.evaluate import evaluate_with
from promptkd.report.report import report
from promptkd.training.model_card import REPOSITORY
from promptkd.training.provenance import origin, public_name

TEACHERS_CARD = """---
license: apache-2.0
language: [en]
base_model: org/large
---
# The teacher
"""


def trained(directory: Path, **student: object) -> Path:
    _, teacher = tiny.save_pair(directory, chat_template=True)
    (teacher / "README.md").write_text(TEACHERS_CARD)
    data = tiny.write_data(directory / "train.jsonl")
    recipe = tiny.recipe(
        directory,
        student=student,
        data={"validation": str(data), "template": "chat", "max_request_tokens": 64},
        optimization={"max_steps": 1},
    )
    return runs.train(recipe) / "student"


@pytest.fixture(scope="module", params=["whole", "lora"])
def student(request, tmp_path_factory) -> Path:
    more = {"lora": {"r": 4}} if request.param == "lora" else {}
    return trained(tmp_path_factory.mktemp(request.param), **more)


def test_a_hub_reads_the_metadata(student):
    card = ModelCard.load(student / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.base_model == ["org/large"]
    assert card.data.pipeline_tag == "text-generation"
    assert {"promptkd", "distillation"} <= set(card.data.tags)
    library = "peft" if (student / "adapter_config.json").is_file() else "transformers"
    assert card.data.library_name == library
    validated = [r for r in card.data.eval_results or [] if r.dataset_type == "validation"]
    results = {r.metric_type: r.metric_value for r in validated}
    best = json.loads((student.parent / "summary.json").read_text())["best"]["scores"]
    assert results == {name: round(value, 4) for name, value in best.items()}
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_held_out_scores_stand_with_their_intervals_beside_start_and_teacher(student):
    data = str(student.parent.parent / "train.jsonl")
    records = evaluate_with(student.parent, ["start", "teacher"], data, num_examples=4)
    for _ in range(2):  # a second report replaces what the first one wrote
        report(student.parent)

    text = (student / "README.md").read_text()
    card = ModelCard(text, ignore_metadata_errors=False)
    index = card.data.to_dict()["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    found = {r.metric_type: r for r in card.data.eval_results or [] if r.dataset_split == "test"}
    own = records["student"]["train"]["scores"]
    assert found.keys() == own.keys()
    for label in ("start", "teacher"):
        others = records[label]["train"]["scores"]
        for name in own.keys() & others.keys():
            beside = (found[name].metric_args or {})[label]
            assert beside["value"] == round(others[name]["mean"], 4)
            assert f"{label} " in (found[name].metric_name or "")
    for name, result in found.items():
        assert result.metric_value == round(own[name]["mean"], 4)
        if "interval_95" in own[name]:
            expected = [round(end, 4) for end in own[name]["interval_95"]]
            assert (result.metric_args or {})["interval_95"] == expected
    assert any(r.dataset_type == "validation" for r in card.data.eval_results or [])

    assert text.count("## Scores on held-out data") == 1
    assert text.index("## Scores on held-out data") < text.index("## Scores on the validation")
    length, low, high = own["response_length"]["mean"], *own["response_length"]["interval_95"]
    assert f"{length:.1f} [{low:.1f}, {high:.1f}]" in text
    assert "| score | this student | start | teacher |" in text


def test_it_names_no_place_on_the_machine(student):
    text = (student / "README.md").read_text()
    assert str(student.parent.parent) not in text
    assert "/tmp" not in text
    assert "Not known to the run, to be added above before publishing: the data's id" in text


def test_the_snippet_writes_from_another_directory(student, tmp_path):
    text = (student / "README.md").read_text()
    found = re.search("```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    code = found[1].replace(f'"{REPOSITORY}"', repr(str(student)))
    code += "\nprint('ENDS', repr(text))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    asked = "user: What is knowledge distillation?\nassistant: "
    assert done.stdout.rstrip().endswith(f"ENDS {asked!r}")


def test_adapters_load_from_elsewhere_though_the_recipe_names_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained(Path(), lora={"r": 4}).absolute().parent
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    for adapter, base in (("student", "student"), ("teacher_adapter", "teacher")):
        config = peft.PeftConfig.from_pretrained(str(run / adapter))
        assert config.base_model_name_or_path == str(tmp_path / base)
    assert AutoPeftModelForCausalLM.from_pretrained(str(run / "student")).num_parameters() > 0


def test_a_model_comes_from_what_its_directory_was_made_of(tmp_path):
    assert origin("org/model") == ["org/model"]
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "pruning.json").write_text(json.dumps({"teacher": "org/large"}))
    assert origin(str(tmp_path / "pruned")) == ["org/large"]
    assert origin(str(tmp_path / "unknown")) == []
    assert public_name(str(tmp_path / "pruned")) == "pruned"
