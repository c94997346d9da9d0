"""A run notices whatever decides its results in the directories that it reads, and names it."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import tiny
from promptkd.errors import UserError
from promptkd.generation.response_cache import fingerprint


def recipe(max_steps: int = 2) -> dict[str, Any]:
    """Of what lies in the current directory."""
    return tiny.recipe(
        Path(),
        method={"name": "gkd"},
        data={"validation": "valid.jsonl", "max_response_tokens": 4},
        evaluation={"every_steps": 0},
        optimization={"max_steps": max_steps},
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Two models, data, and a run of two steps."""
    directory = tmp_path_factory.mktemp("begun")
    tiny.save_pair(directory, chat_template=True)
    tiny.write_data(directory / "train.jsonl")
    rows = [{"prompt": f"say {i}", "response": ["one", "two"]} for i in range(3)]
    (directory / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(directory):
        runs.train(recipe())
    return directory


@pytest.fixture(autouse=True)
def copied(begun, tmp_path, monkeypatch) -> None:
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def record() -> dict[str, Any]:
    return json.loads(Path("run/environment.json").read_text())


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        (
            "student/config.json",
            {"attention_dropout": 0.1},
            "student config (attention_dropout 0.0 -> 0.1",
        ),
        ("student/config.json", {"dtype": "bfloat16"}, "student precision"),
        ("teacher/config.json", {"rms_norm_eps": 0.01}, "teacher config (rms_norm_eps 1e-06 -> "),
        (
            "teacher/config.json",
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
            "teacher config (rope_parameters.rope_theta 10000.0 -> 5.0)",
        ),
        ("teacher/config.json", {"tie_word_embeddings": True}, "teacher "),
        (
            "teacher/generation_config.json",
            {"eos_token_id": [0, 9]},
            "ends of responses (ids [0] -> [0, 9])",
        ),
        (
            "student/generation_config.json",
            {"top_k": 3},
            "student generation_config (do_sample None -> True, top_k None -> 3)",
        ),
        ("student/chat_template.jinja", "{{ messages }}", "student tokenizer (chat_template "),
        (
            "teacher/tokenizer_config.json",
            {"clean_up_tokenization_spaces": True},
            "teacher tokenizer (clean_up_tokenization_spaces False -> True)",
        ),
        (
            "valid.jsonl",
            '{"prompt": "say 0", "response": ["one", "ten"]}\n',
            "validation references",
        ),
    ],
)
def test_a_resume_names_what_has_changed_beside_the_weights(file, changed, said):
    if isinstance(changed, str):
        old = Path(file).read_text().splitlines(keepends=True)
        Path(file).write_text(changed + "".join(old[1:]))
    else:
        edit(Path(file), **changed)
    with pytest.raises(UserError, match=r"run began with other .* Bring them back") as refused:
        runs.train(recipe(max_steps=3))
    assert f"other {said}" in str(refused.value)
    runs.train(recipe(max_steps=3), allow_changes=True)
    (change,) = record()["changes"]
    assert change["after_step"] == 2
    assert any(told.startswith(f"other {said}") for told in change["changed"])


def test_what_an_earlier_version_did_not_record_is_no_change_and_is_recorded_then():
    whole = record()
    kept = {key: whole["contents"][key] for key in ("student weights", "training requests")}
    Path("run/environment.json").write_text(json.dumps(whole | {"contents": kept}))
    runs.train(recipe(max_steps=3))
    assert record()["contents"] == whole["contents"]


def test_what_a_checkpoint_holds_beside_parameters_is_in_its_fingerprint():
    module = torch.nn.Linear(2, 2)
    before = fingerprint(module)
    module.register_buffer("made_anew", torch.zeros(1), persistent=False)
    assert fingerprint(module) == before
    module.register_buffer("saved", torch.zeros(1))
    saved = fingerprint(module)
    assert saved != before
    module.get_buffer("saved").add_(1)
    assert fingerprint(module) != saved
