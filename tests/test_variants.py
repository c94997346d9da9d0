"""Kinds of odd input that a hostile user found: each is used whole, or refused with a reason."""

import datetime
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import peft
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

import promptkd as pk
import tiny
from promptkd.data import read_examples, read_noted
from promptkd.errors import UserError
from promptkd.models.loading import load_model

USER = {"role": "user", "content": "Why?"}


def rows_file(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("train", "test", "split"),
    [
        ("train/p0", "test/p0", "test"),
        ("data/Train/p0", "data/Validation/p0", "validation"),
        ("training/a", "testing/a", "test"),
        ("dolly_train", "dolly_test", "test"),
        ("a-train-0", "a-evaluation-0", "eval"),
        ("train/test_1", "train/train_1", "test"),
    ],
)
def test_splits_by_folders_and_by_any_part_of_a_name_are_not_pooled(tmp_path, train, test, split):
    if train == "train/test_1":  # the file's own name counts before its folder's
        train, test = test, train
    for name in (train, test):
        rows_file(tmp_path / f"{name}.jsonl", {"prompt": name})
    examples, notes = read_noted(str(tmp_path))
    assert [e.instruction for e in examples] == [train]
    assert "train is read" in notes[0]
    assert [e.instruction for e in read_examples(f"{tmp_path}:{split}")] == [test]


def test_a_name_that_only_contains_a_split_s_letters_is_none(tmp_path):
    for name in ("trainer", "contest", "evaluate"):
        rows_file(tmp_path / f"{name}.jsonl", {"prompt": name})
    assert len(read_examples(str(tmp_path))) == 3


def test_a_file_that_is_named_twice_in_two_ways_is_said(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", {"prompt": "x"})
    (tmp_path / "b").mkdir()
    other = str(tmp_path / "b" / ".." / "a.jsonl")
    assert read_noted([path, other])[1] == [f"{other} is read more than once"]


@pytest.mark.parametrize("name", ["a\0b", "\ud800.jsonl"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(UserError, match=r"can't be read: .*Give a file"):
        read_examples(name)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "1"}


def test_half_a_character_in_a_call_is_found_as_in_a_text(tmp_path):
    call = {**CALL, "tool_calls": [{"name": "f\ud800", "arguments": {}}]}
    with pytest.raises(UserError, match=r"d\.jsonl:1: the text holds \\ud800 alone"):
        read_examples(rows_file(tmp_path / "d.jsonl", {"messages": [USER, call, RESULT]}))


def test_what_json_cannot_hold_in_a_call():
    call = {**CALL, "tool_calls": [{"name": "f", "arguments": {"on": datetime.date(2024, 1, 1)}}]}
    with pytest.raises(UserError, match=r"can't be written as JSON .*Make it a text"):
        read_examples([{"messages": [USER, call, RESULT]}])


def test_a_parquet_file_whose_texts_are_not_utf_8(tmp_path):
    offsets, bad = pa.py_buffer(b"\0\0\0\0\x01\0\0\0"), pa.py_buffer(b"\xff")
    texts = pa.StringArray.from_buffers(1, offsets, bad)
    parquet.write_table(pa.Table.from_arrays([texts], names=["prompt"]), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet can't be read: .*Mend or convert it"):
        read_examples(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow"])
def test_a_dataset_is_read_whatever_its_format(form):
    rows = datasets.Dataset.from_list([{"prompt": "x", "output": ["a", "b"]}])
    assert read_examples(rows.with_format(form)) == read_examples(rows)


def test_surplus_fields_of_a_csv_reader_are_named():
    with pytest.raises(UserError, match=r"row 1 of the data has \['z'\] under None"):
        read_examples([{"prompt": "x", None: ["z"]}])


def test_a_message_quotes_no_more_than_a_line_of_a_value():
    with pytest.raises(UserError) as refused:
        read_examples([{"prompt": "x", "output": [["a" * 10_000]]}])
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("column", ["reference", "ground_truth", "expected_output"])
def test_other_names_of_a_reference_are_refused(column):
    with pytest.raises(UserError, match=f"the text in '{column}' would be lost"):
        read_examples([{"prompt": "x", column: "y"}])


def test_a_lora_as_a_student_learns_in_all_its_weights_and_is_looked_at_for_nan(tmp_path):
    base, _ = tiny.save_pair(tmp_path)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(load_model(str(base), torch.float32), adapter).save_pretrained(
        tmp_path / "lora"
    )
    loaded = load_model(str(tmp_path / "lora"), torch.float32)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["lora_alpha"] = float("nan")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"q_proj\.weight holds NaN"):
        load_model(str(tmp_path / "lora"), torch.float32)


@pytest.mark.parametrize(
    ("mark", "reason"),
    [({"weight": 0}, "isn't to be learnt"), ({"prefix": True}, "a response goes on from it")],
)
def test_a_last_turn_marked_as_no_reference_is_refused(tmp_path, mark, reason):
    said = {"role": "assistant", "content": "Because."}
    row = {"messages": [USER, said | mark]}
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: the last assistant turn has.*{reason}"):
        read_examples(rows_file(tmp_path / "rows.jsonl", row))
    plain = {"weight": 1, "prefix": False}
    earlier = {"messages": [USER, said | mark, USER, said | plain]}
    assert read_examples(rows_file(tmp_path / "earlier.jsonl", earlier))[0].responses == (
        "Because.",
    )
    past = {"prompt": "Why?", "history": [USER, said | mark], "response": "So."}
    assert read_examples(rows_file(tmp_path / "past.jsonl", past))[0].responses == ("So.",)


@pytest.mark.parametrize("verb", ["evaluate", "train", "check", "write_report", "load_recipe"])
def test_an_error_of_the_system_is_a_sentence_from_python_too(verb):
    with pytest.raises(UserError, match=r"File name too long\. Name a shorter one"):
        getattr(pk, verb)(300 * "a")


def test_a_verb_can_be_sent_to_another_process():
    assert pickle.loads(pickle.dumps(pk.train)) is pk.train
