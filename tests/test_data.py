"""What users bring becomes requests and responses; what can't be read is named by file and line."""

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import tiny
from promptkd.data import (
    Encoder,
    Example,
    batch_of_step,
    evaluation_set,
    read_examples,
    steps_of_epochs,
    training_set,
)
from promptkd.errors import UserError


def write_json_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def encoder(
    template: str = "none",
    max_request_tokens: int = 256,
    max_response_tokens: int = 256,
    chat_template: bool = False,
) -> Encoder:
    tokenizer = tiny.tokenizer(chat_template)
    return Encoder(tokenizer, template, max_request_tokens, max_response_tokens)


USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "Why?", "input": "It is.", "output": "Because."},
            Example("Why?", "It is.", ("Because.",)),
        ),
        ({"instruction": "Why?", "output": ["A.", "B."]}, Example("Why?", "", ("A.", "B."))),
        ({"instruction": "Why?", "input": None}, Example("Why?")),
        ({"instruction": "Why?", "output": ""}, Example("Why?")),
        ({"prompt": "Why?", "completion": "Because."}, Example("Why?", "", ("Because.",))),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            Example("Why?", "", ("Because.",), (USER,)),
        ),
        ({"prompt": [USER]}, Example("Why?", "", (), (USER,))),
        ({"messages": [USER, ASSISTANT]}, Example("Why?", "", ("Because.",), (USER,))),
        ({"messages": [USER]}, Example("Why?", "", (), (USER,))),
        (
            {"messages": [USER, ASSISTANT, {**USER, "content": "So?"}]},
            Example("So?", "", (), (USER, ASSISTANT, {**USER, "content": "So?"})),
        ),
        ({"request": "Why?", "response": "Because."}, Example("Why?", "", ("Because.",))),
    ],
)
def test_every_accepted_column_layout_becomes_a_request_with_responses(tmp_path, row, expected):
    assert read_examples([write_json_lines(tmp_path / "d.jsonl", row)]) == [expected]


def test_csv_and_parquet_hold_the_same_rows_as_json_lines(tmp_path):
    rows = [
        {"instruction": 'Why,\n"so"?', "input": "", "output": "Because."},
        {"instruction": "Wörter?", "input": "Ein Satz.", "output": "Zwei."},
    ]
    lines = write_json_lines(tmp_path / "d.jsonl", *rows)
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")

    expected = read_examples([lines])
    assert len(expected) == 2
    assert read_examples([str(tmp_path / "d.csv")]) == expected
    assert read_examples([str(tmp_path / "d.parquet")]) == expected


def test_parquet_keeps_conversations_and_lists_of_references(tmp_path):
    table = pyarrow.Table.from_pylist([{"messages": [USER, ASSISTANT]}])
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    table = pyarrow.Table.from_pylist([{"instruction": "Why?", "output": ["A.", "B."]}])
    pyarrow.parquet.write_table(table, tmp_path / "many.parquet")

    found = read_examples([str(tmp_path / "chat.parquet"), str(tmp_path / "many.parquet")])
    assert found == [
        Example("Why?", "", ("Because.",), (USER,)),
        Example("Why?", "", ("A.", "B.")),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    (tmp_path / "d.csv").write_text("instruction,output\nWhy?,Because.\n", encoding="utf-8-sig")
    (tmp_path / "d.jsonl").write_text('{"instruction": "Why?"}\n', encoding="utf-8-sig")

    found = read_examples([str(tmp_path / "d.csv"), str(tmp_path / "d.jsonl")])
    assert [example.instruction for example in found] == ["Why?", "Why?"]


def test_a_glob_reads_its_files_in_order_of_their_names(tmp_path):
    for name in ("b", "a", "c"):
        write_json_lines(tmp_path / f"{name}.jsonl", {"request": name})

    found = read_examples([str(tmp_path / "*.jsonl")])
    assert [example.instruction for example in found] == ["a", "b", "c"]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"request": "a"}\n\n{"request": "b"}\n\n{"request": 3}\n')

    with pytest.raises(UserError, match=r"d\.jsonl:5: 'request' is 3, not a text"):
        read_examples([str(path)])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"request": "b"', r":2: broken JSON \(Expecting ',' delimiter at column 16\)"),
        ('["b"]', ":2: not a JSON object"),
        ('{"query": "b"}', r":2: no request found in the columns \['query'\]"),
        ('{"request": "  "}', ":2: 'request' is '  ', not a text"),
        ('{"instruction": null, "output": "x"}', ":2: 'instruction' is None, not a text"),
        ('{"instruction": "b", "input": 7}', ":2: 'input' is 7, not a text"),
        ('{"request": "b", "response": 7}', ":2: the response is 7, neither a text nor"),
        ('{"messages": [{"role": "user"}]}', ":2: messages must be a list of {role, content}"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            ":2: the conversation has no user turn",
        ),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"request": "a"}}\n{line}\n')

    with pytest.raises(UserError, match=r"d\.jsonl" + complaint):
        read_examples([str(path)])


def test_a_broken_csv_row_is_named_by_its_line(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('instruction,output\n"two\nlines",x\n,y\n')

    with pytest.raises(UserError, match=r"d\.csv:4: 'instruction' is ''"):
        read_examples([str(path)])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("d.jsonl", b"", "holds no rows"),
        ("d.jsonl", b"\n\n", "holds no rows"),
        ("d.csv", b"instruction,output\n", "holds no rows"),
        ("d.txt", b"Why?", "the format '.txt' is unknown"),
        ("d.jsonl", b'{"request": "\xff"}\n', "codec can.t decode byte"),
        ("d.csv", b"request\n\xff\n", "codec can.t decode byte"),
        ("d.parquet", b"PAR1 but no more", "can.t be read"),
    ],
)
def test_a_file_without_readable_rows_is_refused(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(UserError, match=complaint) as refusal:
        read_examples([str(path)])
    assert str(path) in str(refusal.value)


def test_a_missing_file_and_a_glob_without_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"d\.jsonl does not exist"):
        read_examples([str(tmp_path / "d.jsonl")])
    with pytest.raises(UserError, match=r"No file matches .*\*\.jsonl"):
        read_examples([str(tmp_path / "*.jsonl")])


def test_the_alpaca_template_is_the_published_wording():
    with_input = encoder("alpaca").render(Example("Add them.", "2 and 3"))
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd them.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert encoder("alpaca").render(Example("Add 2 and 3.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd 2 and 3.\n\n### Response:\n"
    )


def test_the_template_none_is_the_text_alone():
    assert encoder("none").render(Example("Add them.", "2 and 3")) == "Add them.\n\n2 and 3"
    assert encoder("none").render(Example("Add.")) == "Add."


def test_a_template_file_is_jinja_over_instruction_and_input(tmp_path):
    path = tmp_path / "quiz.jinja"
    path.write_text("Q: {{ instruction }}{% if input %} ({{ input }}){% endif %}\nA:\n")

    assert encoder(str(path)).render(Example("Why?", "hint")) == "Q: Why? (hint)\nA:\n"
    assert encoder(str(path)).render(Example("Why?")) == "Q: Why?\nA:\n"


def test_an_unknown_template_is_refused():
    with pytest.raises(
        UserError, match="'alpacca' is neither auto, alpaca, chat, none nor an existing"
    ):
        encoder("alpacca").render(Example("Why?"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{{ instruction }} {{ question }}", "'question' is undefined"),
        ("{{ question }}", "never reads 'instruction'"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_file_that_cannot_be_rendered_is_refused(tmp_path, text, complaint):
    path = tmp_path / "quiz.jinja"
    path.write_text(text)

    with pytest.raises(UserError, match=rf"quiz\.jinja.*{complaint}"):
        encoder(str(path)).render(Example("Why?"))


def test_a_template_file_that_leaves_out_the_input_is_refused_where_there_is_one(tmp_path):
    path = tmp_path / "short.jinja"
    path.write_text("Q: {{ instruction }}")

    assert encoder(str(path)).render(Example("Why?")) == "Q: Why?"
    with pytest.raises(UserError, match=r"leaves out this row's input\. Put \{\{ input \}\}"):
        encoder(str(path)).render(Example("Why?", "because"))


def test_template_files_run_in_a_sandbox(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ instruction.__class__.__mro__ }}")
    with pytest.raises(UserError, match="fails"):
        encoder(str(path)).render(Example("Why?"))
    (tmp_path / "latin.jinja").write_bytes("{{ instruction }} \xe9".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        encoder(str(tmp_path / "latin.jinja")).render(Example("Why?"))


def test_a_response_ends_with_eos_unless_it_was_cut():
    assert encoder().response_ids("ab")[-1] == tiny.EOS
    cut = encoder(max_response_tokens=3)
    assert cut.response_ids("ab")[-1] == tiny.EOS
    assert tiny.EOS not in cut.response_ids("abc")
    assert len(cut.response_ids("abcdef")) == 3


def test_training_drops_and_counts_requests_over_the_limit():
    examples = [Example("a" * n, responses=("b" * n,)) for n in (3, 11, 4, 10, 12)]
    data = training_set(examples, encoder(max_request_tokens=10, max_response_tokens=6))

    assert [example.index for example in data.examples] == [0, 2, 3]
    assert (data.num_dropped_requests, data.num_cut_requests, data.num_cut_responses) == (2, 0, 1)
    assert data.summary() == ("3 requests (2 too long, dropped; 0 cut to fit; 1 references cut)")


def test_training_data_with_no_request_short_enough_is_refused():
    with pytest.raises(UserError, match="All 1 requests are longer than max_request_tokens = 2"):
        training_set([Example("abc")], encoder(max_request_tokens=2))


def test_evaluation_keeps_every_request_and_cuts_inside_the_template():
    limit = 260
    long_input = Example("Add.", "123 " * 60, ("x",))
    long_instruction = Example("Add this. " * 30, "", ("x",))
    both_long = Example("Add this. " * 30, "123 " * 60, ("x",))
    cutter = encoder("alpaca", max_request_tokens=limit)
    data = evaluation_set([long_input, Example("Add."), long_instruction, both_long], cutter)

    assert (len(data), data.num_dropped_requests, data.num_cut_requests) == (4, 0, 3)
    texts = [cutter.tokenizer.decode(example.request_ids) for example in data.examples]
    for text, example in zip(texts, data.examples, strict=True):
        assert len(example.request_ids) <= limit
        assert text.startswith("Below is an instruction")
        assert text.endswith("### Response:\n")
    assert "### Instruction:\nAdd.\n\n### Input:\n123 123" in texts[0]
    assert texts[1] == cutter.render(Example("Add."))
    assert "### Instruction:\nAdd this. Add this." in texts[2]
    assert "### Instruction:\nAdd this. Add this." in texts[3]


def test_a_request_without_spaces_is_cut_but_not_emptied():
    cutter = encoder(max_request_tokens=10)

    assert len(cutter.request_ids(cutter.cut_to_fit(Example("x" * 50)))) == 10


def test_evaluation_refuses_a_limit_that_the_template_alone_exceeds():
    with pytest.raises(UserError, match="max_request_tokens = 20"):
        evaluation_set([Example("Add.")], encoder("alpaca", max_request_tokens=20))


def test_a_long_conversation_loses_its_oldest_turns_before_anything_is_cut():
    turns = (
        {"role": "system", "content": "Be brief."},
        USER,
        ASSISTANT,
        *[USER, ASSISTANT] * 4,
        USER,
    )
    for make in (training_set, evaluation_set):
        shorter = encoder("chat", max_request_tokens=80, chat_template=True)
        data = make([Example("Why?", messages=turns)], shorter)
        text = shorter.tokenizer.decode(data.examples[0].request_ids)
        assert text == "system: Be brief.\n" + "user: Why?\nassistant: Because.\n" + (
            "user: Why?\nassistant: "
        )
        assert data.num_shortened_conversations == 1
        assert "1 conversations without oldest turns" in data.summary()


def test_a_last_turn_that_is_too_long_alone_is_cut_in_evaluation():
    turns = (USER, ASSISTANT, {"role": "user", "content": "more " * 20})
    cutter = encoder("chat", max_request_tokens=60, chat_template=True)
    data = evaluation_set([Example("more " * 20, messages=turns)], cutter)

    text = cutter.tokenizer.decode(data.examples[0].request_ids)
    assert text.startswith("user: more more")
    assert text.endswith("\nassistant: ")
    assert len(data.examples[0].request_ids) <= 60
    assert (data.num_cut_requests, data.num_shortened_conversations) == (1, 1)


def training_data(num_rows: int):
    return training_set([Example(f"say {i}") for i in range(num_rows)], encoder())


def test_batch_of_step_depends_on_its_arguments_alone():
    data = training_data(13)
    forward = [batch_of_step(data, step, 4, seed=7) for step in range(10)]
    backward = [batch_of_step(training_data(13), step, 4, seed=7) for step in reversed(range(10))]

    assert forward == backward[::-1]
    assert forward != [batch_of_step(data, step, 4, seed=8) for step in range(10)]


@pytest.mark.parametrize("global_batch_size", [1, 4, 5, 13, 30])
def test_every_epoch_sees_each_example_exactly_once(global_batch_size):
    data, num_epochs = training_data(13), 4
    num_steps = -(-num_epochs * 13 // global_batch_size)
    order = [
        example.index
        for step in range(num_steps)
        for example in batch_of_step(data, step, global_batch_size, seed=0).examples
    ]
    epochs = [order[13 * i : 13 * (i + 1)] for i in range(num_epochs)]

    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == num_epochs


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_ranks_share_out_each_batch_without_overlap(num_ranks):
    data = training_data(13)
    for step in range(6):
        whole = batch_of_step(data, step, 5, seed=3).examples
        shares = [batch_of_step(data, step, 5, 3, rank, num_ranks) for rank in range(num_ranks)]
        assert Counter(e for share in shares for e in share.examples) == Counter(whole)
        assert max(len(s.examples) for s in shares) - min(len(s.examples) for s in shares) <= 1


def test_epochs_are_rounded_up_to_whole_steps():
    assert steps_of_epochs(1.0, num_examples=13, global_batch_size=4) == 4
    assert steps_of_epochs(2.0, num_examples=12, global_batch_size=4) == 6
    assert steps_of_epochs(0.1, num_examples=3, global_batch_size=32) == 1


def test_a_request_keeps_the_tokenizers_start_token_and_loses_its_end_token():
    from tokenizers.processors import TemplateProcessing

    plain, wrapping = encoder(), encoder()
    wrapping.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", tiny.PAD), ("<eos>", tiny.EOS)]
    )

    own = plain.request_ids(Example("ab"))
    assert wrapping.request_ids(Example("ab")) == (tiny.PAD, *own)
    assert wrapping.response_ids("ab") == plain.response_ids("ab")
