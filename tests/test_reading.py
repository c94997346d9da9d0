"""Whatever shape data comes in, its requests are read whole, or refused with file and line."""

import gzip
import json

import datasets
import pytest

import tiny
from promptkd.data import Encoder, Example, evaluation_set, read_examples, read_noted
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
    with pytest.raises(UserError, match="can't be read"):
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
    columns = {"request": "q", "response": "a"}
    assert read_examples([path], columns) == [Example("Why?", responses=("So.",))]
    with pytest.raises(UserError, match=r"'hint', which isn't there\. The row has q, a, prompt"):
        read_examples([path], columns | {"input": "hint"})
    with pytest.raises(UserError, match="names 'responses'; did you mean 'response'"):
        read_examples([path], {"responses": "a"})


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
    with pytest.raises(UserError, match=r"d\.jsonl:1: the column 'documents' holds part of"):
        rows_of(tmp_path, {**ROWS[0], "documents": ["a"]})
    with pytest.raises(UserError, match="'input' and 'context' both hold a text"):
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


def test_half_a_character_is_named_by_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"d\.jsonl:2: 'response' holds half a character"):
        read_examples(
            [
                write(
                    tmp_path / "d.jsonl",
                    '{"request": "a"}\n{"instruction": "b", "output": "\\ud800"}',
                )
            ]
        )


def test_a_template_that_refuses_a_conversation_is_quoted_with_file_and_line(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    examples = rows_of(tmp_path, {"messages": turns})
    with pytest.raises(
        UserError, match=r'd\.jsonl:1: .* refuses the turns system, user: "no system'
    ):
        evaluation_set(examples, Encoder(tokenizer, "auto", 50, 50))


def test_auto_is_the_chat_template_where_there_is_one():
    assert Encoder(tiny.tokenizer(chat_template=True), "auto", 9, 9).template == "chat"
    assert Encoder(tiny.tokenizer(), "auto", 9, 9).template == "alpaca"


def test_template_options_reach_the_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if thinking %} think{% endif %}"
    encoder = Encoder(tokenizer, "chat", 50, 50, template_options={"thinking": True})
    assert encoder.render(Example("Why?")) == "Why? think"


def test_references_end_as_the_chat_template_ends_a_turn_and_only_once():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoder = Encoder(tokenizer, "chat", 50, 50)
    assert encoder.eos_token_id == tiny.PAD
    assert encoder.response_ids("a")[-1] == tiny.PAD
    assert encoder.response_ids("a<eos>").count(tiny.EOS) == 0
    assert Encoder(tokenizer, "none", 50, 50).response_ids("a<eos>").count(tiny.EOS) == 1
    quoting = evaluation_set([Example("What is <pad>?")], Encoder(tokenizer, "none", 50, 50))
    assert "1 with special tokens in their texts" in quoting.summary()


def test_template_files_run_in_a_sandbox(tmp_path):
    path = write(tmp_path / "t.jinja", "{{ instruction.__class__.__mro__ }}")
    with pytest.raises(UserError, match="fails"):
        Encoder(tiny.tokenizer(), path, 50, 50).render(Example("Why?"))
    (tmp_path / "latin.jinja").write_bytes("{{ instruction }} \xe9".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        Encoder(tiny.tokenizer(), str(tmp_path / "latin.jinja"), 50, 50).render(Example("Why?"))
