"""What users bring that is nearly right: used whole, or refused by the name that they gave it."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from promptkd.cli import main
from promptkd.config import TeacherSection, recipe_from_dict
from promptkd.data import Encoder, Example, read_examples, read_noted
from promptkd.errors import UserError
from promptkd.evaluation.metrics import check_criterion
from promptkd.generation.response_cache import author_of
from promptkd.methods import build_method
from promptkd.study.file import study_from_dict
from promptkd.study.run import StudyScorer

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def read(place: Path, *rows: Any) -> list[Example]:
    path = place / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "context": "W"},
        {"messages": [USER, ASSISTANT], "completion": "S"},
        {"messages": [USER, ASSISTANT], "system": "Why?", "history": "h"},
        {"prompt": "Why?", "completion": "So.", "hint": "So."},
        {"prompt": "Why?", "completion": "So.", "documents": "y"},
        {"prompt": "Why?", "completion": "So.", "chat_history": "?"},
    ],
    ids=lambda row: [*row][-1],
)
def test_a_carrier_of_text_is_not_read_because_its_text_occurs_by_chance(tmp_path, row):
    with pytest.raises(UserError, match=f"the text in '{[*row][-1]}' would be lost"):
        read(tmp_path, row)


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([{"role": "user", "content": "x", "documents": ["d"]}], "has 'documents', which would be"),
        ([USER, {**ASSISTANT, "function_call": {"name": "f"}}, USER], "has 'function_call'"),
        ([{"role": "User", "content": "x"}, ASSISTANT], "the last one before is of 'User'"),
        ([ASSISTANT], "to respond to: there is none"),
    ],
)
def test_a_turn_says_what_is_wrong_with_it(tmp_path, turns, complaint):
    with pytest.raises(UserError, match=rf"d\.jsonl:1: .*{complaint}"):
        read(tmp_path, {"messages": turns})


def test_a_request_that_only_the_teacher_reads_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"'prompt' is teacher\.context, for the teacher alone"):
        read_examples(str(path), teacher_context="prompt")


def fill(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


ROW = b'{"instruction": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("b__jsonl__zst", b"x", "would be left out: promptkd doesn't read '.zst'"),
        ("b__gz", gzip.compress(ROW, mtime=0), "would be left out: promptkd doesn't read '.gz'"),
        ("b__jsonl", b"", r"b\.jsonl holds no rows"),
        ("b__jsonl", b"\x28\xb5\x2f\xfd", "is in the form of zstd, not text"),
    ],
)
def test_nothing_of_a_folder_is_passed_over(tmp_path, name, content, complaint):
    fill(tmp_path, a__jsonl=ROW, **{name: content})
    with pytest.raises(UserError, match=complaint):
        read_examples(str(tmp_path))


def test_links_that_would_be_passed_over_are_refused_and_other_files_named(tmp_path):
    fill(tmp_path, a__jsonl=ROW, README__md=b"x")
    assert read_noted(str(tmp_path))[1] == [f"{tmp_path}: not read: README.md"]
    (tmp_path / "more").symlink_to(tmp_path.parent)
    with pytest.raises(UserError, match="more is a link to a folder, or leads nowhere"):
        read_examples(str(tmp_path))


def test_a_glob_of_two_stars_reaches_every_folder_once(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "one" / "two"):
        folder.mkdir()
        fill(folder, a__jsonl=ROW)
    assert len(read_examples(str(tmp_path / "**"))) == 2
    assert len(read_examples(str(tmp_path / "**" / "*.jsonl"))) == 2


def test_a_file_that_is_named_twice_is_said(tmp_path):
    fill(tmp_path, a__jsonl=ROW)
    path = str(tmp_path / "a.jsonl")
    assert read_noted([path, path])[1] == [f"{path} is read more than once"]


FAILING = "line\n{{ instruction }}{{ input }}\n{{ 1 // 0 }}"


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"template": "none.jinja"}, r"teacher\.template 'none\.jinja' is neither"),
        ({"template": "FILE"}, r"teacher\.template .*t\.jinja fails in line 3"),
        ({"template": "chat"}, r"The teacher is to be asked by a chat template"),
        ({"template": "alpaca", "template_options": {"x": 1}}, r"teacher\.template_options \(x\)"),
        ({"context_template": "FILE"}, r"teacher\.context_template .*t\.jinja fails in line 3"),
        ({"context_template": "{% for %}"}, r"teacher\.context_template is no Jinja template"),
        ({"system": "~nobody-here/x.txt"}, r"teacher\.system ~nobody-here/x\.txt"),
    ],
)
def test_what_is_wrong_with_the_teachers_request_is_blamed_on_its_own_key(
    tmp_path, section, complaint
):
    (tmp_path / "t.jinja").write_text(FAILING)
    named = {k: str(tmp_path / "t.jinja") if v == "FILE" else v for k, v in section.items()}
    students = Encoder(tiny.tokenizer(), "none")

    def ask() -> None:
        encoder = students.for_teacher(TeacherSection(model="t", **named), tiny.tokenizer())
        assert encoder is not None
        encoder.render(Example("Why?", where="d.jsonl:7"))

    with pytest.raises(UserError, match=complaint) as raised:
        ask()
    assert "data.template " not in str(raised.value)


def test_options_of_the_student_reach_the_teachers_template_where_it_reads_them():
    students, teachers = (tiny.tokenizer(chat_template=True) for _ in range(2))
    students.chat_template += "{{ tone }}"
    encoder = Encoder(students, "chat", template_options={"tone": "!"})
    own = encoder.for_teacher(TeacherSection(model="t", template="chat"), teachers)
    assert own is not None
    assert own.render(Example("Why?")) == "user: Why?\nassistant: "


def test_a_template_file_is_read_anew_by_the_next_run(tmp_path):
    for wording in ("Q: {{ instruction }}", "A: {{ instruction }}"):
        (tmp_path / "t.jinja").write_text(wording)
        rendered = Encoder(tiny.tokenizer(), str(tmp_path / "t.jinja")).render(Example("x"))
        assert rendered == wording.replace("{{ instruction }}", "x")


@pytest.mark.parametrize("key", ["adaptation_divergence", "regularizer_divergence", "divergence"])
@pytest.mark.parametrize("value", ["no_such:module", "revers_kl"])
def test_a_divergence_that_is_none_is_blamed_on_its_key(key, value):
    with pytest.raises(UserError, match=rf"^method\.{key}: .*'{value}'"):
        build_method("promptkd", **{key: value})


def test_a_function_that_chooses_the_student_is_blamed_on_its_key():
    with pytest.raises(UserError, match=r"^evaluation\.metric 'no_such:module' cannot be imported"):
        check_criterion("no_such:module", [("a",)])


@pytest.mark.parametrize(
    ("command", "content", "what"),
    [
        ("check", "base: {}\nmethods: {}", r"f\.yaml is a study, for promptkd study"),
        ("train", "command: evaluate", r"f\.yaml is a stage of a whole path"),
        ("study", "student: {model: m}", r"f\.yaml is a recipe, for promptkd train"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, capfd, command, content, what):
    (tmp_path / "f.yaml").write_text(content)
    with pytest.raises(SystemExit):
        main([command, str(tmp_path / "f.yaml")])
    assert re.search(what, capfd.readouterr().err)


def test_home_is_meant_by_its_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = tiny.recipe(tmp_path, output="~/run")
    assert recipe_from_dict(raw).output == str(tmp_path / "run")


def test_kept_responses_belong_to_a_configuration_too():
    models = [tiny.model("llama", rope_theta=theta) for theta in (1e4, 1e4, 1e6)]
    first, same, other = (author_of(model, model.dtype, [0]) for model in models)
    assert first == same != other


def test_a_study_scores_nothing_twice(tmp_path):
    """``auto``, a student that takes its teacher's template, ends in references, no context."""
    tiny.save_pair(tmp_path)
    tiny.tokenizer(chat_template=True).save_pretrained(tmp_path / "teacher")
    rows = [{"instruction": f"say {i}", "output": f"{i}<eos>", "hint": "h"} for i in range(3)]
    for name, left_out in (("with", ""), ("without", "hint")):
        kept = ({k: v for k, v in row.items() if k != left_out} for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    base = tiny.recipe(tmp_path, data={"template": "auto", "max_response_tokens": 4})
    base["data"] |= {"train": str(tmp_path / "with.jsonl"), "max_request_tokens": 60}
    base["teacher"] |= {"context": "hint"}
    del base["method"], base["output"]
    suite = {name: str(tmp_path / f"{name}.jsonl") for name in ("with", "without")}
    scorer = StudyScorer(
        study_from_dict(
            {
                "base": base,
                "methods": {"kd": {"method": {"name": "kd"}}},
                "evaluation": {"suite": suite, "seeds": [1]},
                "output": str(tmp_path / "study"),
            }
        )
    )
    for role in ("student", "teacher"):
        place = tmp_path / "scores" / role
        asked = (str(tmp_path / role), place)
        found = scorer.score(*asked, teacher=role == "student")
        assert {own.template for own in found.values()} == {"chat"}
        before = runs.everything(place)
        assert scorer.score(*asked, teacher=role == "student").keys() == {"with", "without"}
        assert runs.everything(place) == before
