"""The model card: hubs can read it, its snippet runs from anywhere, it names no private path."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import runs
import tiny
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
    results = {r.metric_type: r.metric_value for r in card.data.eval_results or []}
    best = json.loads((student.parent / "summary.json").read_text())["best"]["scores"]
    assert results == {name: round(value, 4) for name, value in best.items()}
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


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


def test_a_model_comes_from_what_its_directory_was_made_of(tmp_path):
    assert origin("org/model") == ["org/model"]
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "pruning.json").write_text(json.dumps({"teacher": "org/large"}))
    assert origin(str(tmp_path / "pruned")) == ["org/large"]
    assert origin(str(tmp_path / "unknown")) == []
    assert public_name(str(tmp_path / "pruned")) == "pruned"
