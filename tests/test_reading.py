"""Whatever shape data comes in, its requests are read whole, or refused with file and line."""

import gzip
import json
import os
import time

import datasets
import pytest

from promptkd.config import ColumnsSection
from promptkd.data import (
    Example,
    read_examples,
    read_noted,
)
from promptkd.errors import UserError

ROWS = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(3)]
EXPECTED = [Example(f"Say {i}.", responses=(f"{i}.",)) for i in range(3)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(tmp_path, *rows):
    return read_examples([write(tmp_path / "d.jsonl", "".join(json.dumps(r) + "\n" for r in rows))])


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=4),
        json.dumps({"data": ROWS}, indent=1),
        "\n".join(map(json.dumps, ROWS)),
    ],
)
def test_json_is_read_as_array_wrapped_array_or_lines(tmp_path, text):
    assert read_examples([write(tmp_path / "d.json", text)]) == EXPECTED


def test_broken_items_of_an_array_are_named_by_line(tmp_path):
    text = json.dumps(ROWS, indent=1).replace('"output": "1."', '"output": 1')
    with pytest.raises(UserError, match=r"d\.json:6: the response is 1"):
        read_examples([write(tmp_path / "d.json", text)])
    with pytest.raises(UserError, match=r"d\.json:\d+: broken JSON"):
        read_examples([write(tmp_path / "d.json", json.dumps(ROWS, indent=1)[:-9])])


def test_deeply_nested_json_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"d\.jsonl:1: broken JSON \(nested too deeply\)"):
        read_examples([write(tmp_path / "d.jsonl", "[" * 100_000)])


def test_saved_data_sets_folders_and_compressed_files_are_read(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    whole.to_parquet(str(tmp_path / "folder" / "part-0.parquet"))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    for name in ("saved", "splits", "folder", "d.jsonl.gz"):
        assert read_examples([str(tmp_path / name)]) == EXPECTED, name
    assert read_examples([whole]) == read_examples(ROWS) == EXPECTED


def test_a_path_that_exists_is_no_pattern(tmp_path):
    assert read_examples([write(tmp_path / "a[1].jsonl", json.dumps(ROWS[0]))]) == EXPECTED[:1]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "context": "It rains.", "response": "So."},
        {"question": "Why?", "context": "It rains.", "answer": "So."},
        {"prompt": "Why?", "input": "It rains.", "completion": "So."},
    ],
)
def test_context_and_response_are_read_whatever_they_are_called(tmp_path, row):
    assert rows_of(tmp_path, row) == [Example("Why?", "It rains.", ("So.",))]


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "d.jsonl", json.dumps({"q": "Why?", "a": "So.", "prompt": "not this"}))
    columns = ColumnsSection(request="q", response="a", ignore=("prompt",))
    assert read_examples([path], columns) == [Example("Why?", responses=("So.",))]
    with pytest.raises(UserError, match=r"names 'hint', but .* has only the columns a, prompt, q"):
        read_examples([path], columns.model_copy(update={"context": "hint"}))
    with pytest.raises(UserError, match=r"d\.jsonl:1: the text in 'prompt' would be lost"):
        read_examples([path], ColumnsSection(request="q", response="a"))


def test_a_source_with_none_of_the_named_columns_is_read_by_its_own_names(tmp_path):
    path = write(tmp_path / "test.jsonl", json.dumps(ROWS[0]))
    examples, notes = read_noted([path], ColumnsSection(request="q", response="a"))
    assert examples == EXPECTED[:1]
    assert notes == [f"{path} has none of data.columns (a, q): it is read by its own column names"]


def test_system_and_history_become_turns(tmp_path):
    row = {"instruction": "And in May?", "input": "", "output": "Warm.", "system": "One word."}
    (example,) = rows_of(tmp_path, row | {"history": [["April?", "Wet."]]})
    assert [(t["role"], t["content"]) for t in example.messages] == [
        ("system", "One word."),
        ("user", "April?"),
        ("assistant", "Wet."),
        ("user", "And in May?"),
    ]
    assert example.responses == ("Warm.",)


def test_columns_that_nobody_reads_are_named_once_and_carriers_of_text_refused(tmp_path):
    rows = [{**row, "category": "qa", "id": i} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_noted([path])[1] == [f"{path}: the columns category, id are not read"]
    with pytest.raises(UserError, match=r"d\.jsonl:1: the text in 'documents' would be lost"):
        rows_of(tmp_path, {**ROWS[0], "documents": ["a"]})
    with pytest.raises(UserError, match="'input' and 'context' could each be the context"):
        rows_of(tmp_path, {"instruction": "a", "input": "b", "context": "c"})


def test_sharegpt_turns_content_parts_and_tool_turns_are_read(tmp_path):
    turns = [
        {"from": "human", "value": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky"}}]},
        {"role": "tool", "content": [{"type": "text", "text": "rain"}]},
        {"from": "gpt", "value": "It rains."},
    ]
    (example,) = rows_of(tmp_path, {"conversations": turns, "tools": [{"name": "sky"}]})
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool"]
    assert example.messages[1]["tool_calls"] == [{"function": {"name": "sky"}}]
    assert (example.messages[2]["content"], example.responses) == ("rain", ("It rains.",))
    assert example.tools == ({"name": "sky"},)
    image = [{"role": "user", "content": [{"type": "image", "image": "x"}]}]
    with pytest.raises(UserError, match="a part of type 'image'; only text"):
        rows_of(tmp_path, {"messages": image})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('instruction,output\n"Say 1.,1\nSay 2.,2\n', r"d\.csv:3: broken CSV"),
        ("instruction,output\na,b,c\n", r"d\.csv:2: 3 fields under 2 columns"),
        ("instruction,output\na\n", r"d\.csv:2: 1 fields under 2 columns"),
        ("instruction,output,output\na,b,c\n", r"d\.csv:1: the column 'output' stands there twice"),
    ],
)
def test_csv_that_would_lose_rows_is_refused_with_its_line(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        read_examples([write(tmp_path / "d.csv", text)])


def test_rows_of_different_kinds_stand_in_one_file(tmp_path):
    """Whatever the other rows have; files with columns fill what a row hasn't with null."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [
        {"prompt": "Why?", "completion": "So.", "messages": None},
        {"messages": turns, "prompt": None, "completion": None},
        {"instruction": "Why?", "output": "So.", "messages": []},
        {"question": "Why?", "answer": "So."},
    ]
    single, chat, *others = rows_of(tmp_path, *rows)
    assert single == Example("Why?", responses=("So.",))
    assert chat == Example("Why?", responses=("So.",), messages=tuple(turns[:1]))
    assert others == [single, single]
    table = datasets.Dataset.from_list(rows[:2])
    assert read_examples(table) == [single, chat]
    mapped = ColumnsSection(request="q")
    path = write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, [{"q": "Why?"}, rows[1]])))
    assert [e.instruction for e in read_examples([path], mapped)] == ["Why?", "Why?"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "\ud800"},
        {"instruction": "a", "input": "\ud800"},
        {"instruction": "a", "output": ["b", "\udfff"]},
        {"instruction": "a", "system": "\ud800"},
        {"instruction": "a", "history": [["b", "\ud800"]]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "\ud800"},
            ]
        },
        {"instruction": "a", "notes": "\ud800"},
    ],
    ids=str,
)
def test_half_a_character_in_any_text_of_a_row_is_refused(tmp_path, row):
    path = write(tmp_path / "d.jsonl", json.dumps(row))
    with pytest.raises(UserError, match=r"d\.jsonl:1: the text holds \\ud"):
        read_examples([path], teacher_context="notes" if "notes" in row else None)


def test_half_a_character_is_named_by_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"d\.jsonl:2: the text holds \\ud800 alone, half of a"):
        read_examples(
            [
                write(
                    tmp_path / "d.jsonl",
                    '{"request": "a"}\n{"instruction": "b", "output": "\\ud800"}',
                )
            ]
        )


USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"instruction": "a", "output": "x", "response": "y"}, "could each be the response"),
        ({"instruction": "a", "question": "b"}, "could each be the request"),
        ({"messages": [USER, ASSISTANT], "context": "doc"}, "the text in 'context' would be lost"),
        ({"messages": [USER], "history": [["h", "i"]]}, "the text in 'history' would be lost"),
        ({"prompt": [USER], "context": "doc"}, "the text in 'context' would be lost"),
        ({"prompt": "a", "chosen": "x"}, "the text in 'chosen' would be lost"),
        ({"question": "a", "answers": {"text": ["x"]}}, "the text in 'answers' would be lost"),
        ({"messages": [USER, {**ASSISTANT, "thinking": "hm"}]}, "has thinking beside its text"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "s"}]}]}, "has tool_calls"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "is from 'function_call'"),
        ({"conversations": [{"from": ["x"], "value": "v"}]}, r"is from \['x'\]"),
        ({"prompt": []}, r"'prompt' is \[\], not a text"),
        ({"prompt": ["a", "b"]}, "'prompt' is .*, not a text"),
        ({"prompt": [USER], "completion": [ASSISTANT, USER]}, "ends with a turn of 'user'"),
        ({"messages": [{"role": "user", "content": []}, ASSISTANT]}, "the last user turn is empty"),
        ({"instruction": "a", "Input": "doc"}, "the text in 'Input' would be lost"),
        ({"question": "a", "choices": ["x", "y"]}, "the text in 'choices' would be lost"),
        ({"question": "a", "premise": "doc"}, "the text in 'premise' would be lost"),
        ({"instruction": "a", "history": ["h"]}, "It is a list of .request, response. pairs"),
        ({"messages": [USER], "tools": "sky"}, "the tools aren't JSON"),
        ({"system": "b", "messages": [{"role": "system", "content": "a"}, USER]}, "Keep one"),
    ],
)
def test_what_would_be_lost_of_a_row_is_refused_by_file_and_line(tmp_path, row, complaint):
    with pytest.raises(UserError, match=r"d\.jsonl:2: .*" + complaint):
        rows_of(tmp_path, ROWS[0], row)


def test_a_column_whose_text_is_read_from_another_one_is_only_named(tmp_path):
    path = write(tmp_path / "d.jsonl", json.dumps({"prompt": "Why?", "messages": [USER]}))
    examples, notes = read_noted([path])
    assert examples == [Example("Why?", messages=(USER,))]
    assert notes == [f"{path}: the column prompt is not read"]


def test_tools_and_arguments_of_calls_given_as_json_become_objects(tmp_path):
    call = {"type": "function", "function": {"name": "sky", "arguments": '{"day": 1}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "content": "rain", "tool_call_id": "7"})
    (example,) = rows_of(tmp_path, {"messages": turns, "tools": '[{"name": "sky"}]'})
    assert example.tools == ({"name": "sky"},)
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"day": 1}
    assert example.messages[2] == {"role": "tool", "content": "rain", "tool_call_id": "7"}


def test_keys_of_turns_that_no_template_reads_are_named(tmp_path):
    path = write(tmp_path / "d.jsonl", json.dumps({"messages": [{**USER, "id": 7, "name": None}]}))
    examples, notes = read_noted([path])
    assert examples == [Example("Why?", messages=(USER,))]
    assert notes == [f"{path}: the column messages[].id is not read"]
    path = write(tmp_path / "d.jsonl", json.dumps({"messages": [{**USER, "value": "other"}]}))
    assert read_noted([path])[1] == [f"{path}: the column messages[].value is not read"]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("d.jsonl", '{"request": "a", "request": "b"}', ":1: .*the key 'request' occurs twice"),
        ("d.json", '[{"request": "a"}\n{"request": "b"}]', ":2: broken JSON .*expected ','"),
        ("d.json", '[{"request": "a"}]\n{"request": "b"}', ":1: broken JSON .*expected ','"),
        ("d.json", '[{"request": "a"},\n', ":2: broken JSON"),
        ("d.json", '{"data": [{"request": "a"},\n{"request" "b"}]}', ":2: broken JSON"),
        ("d.csv", "request\na\0b\n", ":2 holds a NUL byte"),
        ("d.csv", "request;response\na;b\n", ":1: the header is the single column"),
        ("d.jsonl", b'{"request": "a"}\n{"request": "\xff"}', ":2 can't be read: 'utf-8' codec"),
        ("d.jsonl", '{"request": "a"}\n'.encode("utf-16-le"), ":1 holds a NUL byte"),
        ("d.jsonl.gz", b"\x1f\x8b no", " can't be decompressed"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, text, complaint):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=name.replace(".", r"\.") + complaint):
        read_examples([str(path)])


def test_texts_keep_their_characters_in_every_encoding_with_a_mark(tmp_path):
    text = "a\u2028b\x85c \u0645\u0631 \U0001f468\u200d\U0001f469"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        line = json.dumps({"request": text}, ensure_ascii=False)
        (tmp_path / "d.jsonl").write_bytes(f"{line}\r\n{line}\r\n".encode(encoding))
        assert read_examples(str(tmp_path / "d.jsonl")) == [Example(text)] * 2, encoding


def test_fields_of_csv_keep_line_ends_and_may_be_long(tmp_path):
    long = "x" * 200_000
    (tmp_path / "d.csv").write_bytes(f'request, response\r\n"a\r\nb",{long}\r\n'.encode())
    assert read_examples(str(tmp_path / "d.csv")) == [Example("a\r\nb", responses=(long,))]
    (tmp_path / "d.tsv").write_text("request\tresponse\na, b\tc\n")
    assert read_examples(str(tmp_path / "d.tsv")) == [Example("a, b", responses=("c",))]


def test_what_stands_beside_the_data_of_one_object_holds_for_every_row(tmp_path):
    whole = {"system": "Be brief.", "data": [{"request": "Why?"}]}
    (example,) = read_examples(write(tmp_path / "d.json", json.dumps(whole, indent=1)))
    assert [turn["content"] for turn in example.messages] == ["Be brief.", "Why?"]


def test_one_of_several_splits_is_read_and_the_others_are_named(tmp_path):
    for name, row in (("train-0", ROWS[0]), ("test", ROWS[1]), ("sub/train-1", ROWS[2])):
        path = tmp_path / "files" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row))
    splits = {"train": datasets.Dataset.from_list([ROWS[0], ROWS[2]])}
    splits["test"] = datasets.Dataset.from_list(ROWS[1:2])
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    for folder in (str(tmp_path / "files"), str(tmp_path / "saved")):
        examples, notes = read_noted(folder)
        assert {e.instruction for e in examples} == {"Say 0.", "Say 2."}
        assert len(notes) == 1
        assert "train is read; name another as" in notes[0]
        assert read_examples(f"{folder}:test") == EXPECTED[1:2]
        with pytest.raises(UserError, match="has no split 'dev'; there are:"):
            read_examples(f"{folder}:dev")
    with pytest.raises(UserError, match="mapping of the splits 'train', 'test'"):
        read_examples(datasets.DatasetDict(splits))


def test_a_large_array_is_read_in_linear_time(tmp_path):
    rows = [{"request": "x" * 8_000} for _ in range(3_000)]
    path = write(tmp_path / "d.json", json.dumps(rows))
    start = time.process_time()
    assert len(read_examples(path)) == len(rows)
    assert time.process_time() - start < 4  # an array that is copied for each row takes longer


def test_a_column_without_a_name_is_nobodys(tmp_path):
    examples, notes = read_noted([write(tmp_path / "d.csv", ",instruction,output\n0,a,b\n")])
    assert examples == [Example("a", responses=("b",))]
    assert notes == [f"{tmp_path}/d.csv: the column without a name is not read"]


def test_white_space_is_no_text(tmp_path):
    turns = [USER, {"role": "assistant", "content": " \n"}]
    first, second = rows_of(
        tmp_path, {"instruction": "a", "input": " ", "output": ["\n", "b"]}, {"messages": turns}
    )
    assert first == Example("a", responses=("b",))
    assert second == Example("Why?", messages=(USER,))


def test_numbers_in_a_column_that_carries_text_elsewhere_are_only_named(tmp_path):
    path = write(tmp_path / "d.jsonl", json.dumps({"instruction": "a", "turns": 2}))
    assert read_noted([path])[1] == [f"{path}: the column turns is not read"]


def test_a_compressed_file_is_read_whatever_its_name(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(gzip.compress(b'{"instruction": "a"}'))
    assert read_examples([str(tmp_path / "d.jsonl")]) == [Example("a")]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        read_examples([str(tmp_path / "d.jsonl")])
    with pytest.raises(UserError, match="The name of the data is empty"):
        read_examples([""])
