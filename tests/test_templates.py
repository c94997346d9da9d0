"""Chat templates: what they are given, what they must not leave out, and what is found in them."""

import datetime
import json

import pytest
from transformers import AutoTokenizer

import tiny
from promptkd.api import train
from promptkd.config import recipe_from_dict
from promptkd.data import (
    Encoder,
    Example,
    adopt_chat_template,
    evaluation_set,
    template_difference,
    template_findings,
)
from promptkd.errors import UserError
from promptkd.evaluation.finished_run import load_run

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>\n{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}assistant: {% endif %}"
USER = {"role": "user", "content": "Why?"}
SINGLE = Example("Why?", responses=("So.",))


def tokenizer(chat_template):
    made = tiny.tokenizer()
    made.chat_template = chat_template
    return made


def encoder(chat_template, template="auto", **options):
    date = datetime.date(2026, 3, 1)
    made = tokenizer(chat_template)
    return Encoder(made, template, 200, 50, template_options=options, date=date)


def test_the_clock_of_a_template_is_the_the_date_of_the_encoder():
    dated = encoder("{{ strftime_now('%d %b %Y') }}\n" + TURNS + ASSISTANT)
    assert dated.render(SINGLE).startswith("01 Mar 2026\nuser: Why?")
    later = Encoder(dated.tokenizer, date=datetime.date(2026, 3, 2))
    data, other = evaluation_set([SINGLE], dated), evaluation_set([SINGLE], later)
    assert data.digest() != other.digest()
    assert data.digest() == evaluation_set([SINGLE], dated).digest()


@pytest.mark.parametrize(
    ("chat_template", "template", "options", "complaint"),
    [
        (TURNS, "chat", {"enable_thinkin": False}, "never reads 'enable_thinkin'"),
        (TURNS, "alpaca", {"x": 1}, r"data\.template is 'alpaca'\. Remove them"),
        (None, "auto", {"x": 1}, r"data\.template is 'alpaca'\. Remove them"),
        (None, "chat", {}, "'auto', which gives the student its teacher's"),
    ],
)
def test_options_that_no_template_reads_are_refused(chat_template, template, options, complaint):
    with pytest.raises(UserError, match=complaint):
        encoder(chat_template, template, **options)


def test_arguments_of_the_rendering_are_no_template_options(tmp_path):
    data = {"template_options": {"add_generation_prompt": False}}
    with pytest.raises(UserError, match="add_generation_prompt can't be set here"):
        recipe_from_dict(tiny.recipe(tmp_path, data=data))


TOOL = {"type": "function", "function": {"name": "sky", "parameters": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sky"}}]}


@pytest.mark.parametrize(
    ("chat_template", "messages", "tools", "complaint"),
    [
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
            (USER, {"role": "tool", "content": "rain"}),
            (),
            "leaves out 'rain' of a turn of 'tool'",
        ),
        (TURNS, (USER, CALL, USER), (), "leaves out 'sky' of a turn of 'assistant'"),
        (TURNS, (USER,), (TOOL,), "leaves out the tool 'sky'"),
        ("{{ messages[-1].content }}", ({"role": "system", "content": "Hm."}, USER), (), "'Hm.'"),
    ],
)
def test_a_chat_template_that_leaves_out_a_part_of_the_conversation_is_refused(
    chat_template, messages, tools, complaint
):
    example = Example("Why?", messages=messages, tools=tools, where="d.jsonl:7")
    with pytest.raises(UserError, match=r"d\.jsonl:7: .*" + complaint):
        encoder(chat_template).render(example)


def test_a_chat_template_may_drop_the_thoughts_of_earlier_turns():
    thought = {"role": "assistant", "content": "<think>hm</think> So."}
    drops = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert encoder(drops).render(Example("Why?", messages=(USER, thought, USER))) == "Why? So.Why?"


def test_tools_need_the_chat_template():
    example = Example("Why?", messages=(USER,), tools=(TOOL,), where="d.jsonl:7")
    with pytest.raises(UserError, match=r"d\.jsonl:7: a conversation with tools needs"):
        encoder(None, "alpaca").render(example)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("{{ 1 / 0 }}", "fails on the turns user"),
        ("{{ messages[9].content }}", "fails on the turns user"),
        ("{% for m in messages %}", "fails on the turns user"),
        ("{{ raise_exception('never') }}", 'refuses the turns user: "never'),
    ],
)
def test_whatever_a_chat_template_raises_is_quoted_with_file_and_line(fault, said):
    with pytest.raises(UserError, match=rf"d\.jsonl:7: the chat template {said}"):
        encoder(fault).render(Example("Why?", messages=(USER,), where="d.jsonl:7"))


def test_a_template_file_that_raises_is_named_with_file_and_line(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ instruction }}{{ 10 ** 5 // input|length }}")
    with pytest.raises(UserError, match=r"d\.jsonl:7: data\.template .*t\.jinja fails"):
        encoder(None, str(tmp_path / "t.jinja")).render(Example("Why?", where="d.jsonl:7"))


def test_half_a_character_in_a_request_of_the_command_line_is_refused():
    with pytest.raises(UserError, match=r"holds \\udcff alone"):
        encoder(None, "none").request_ids(Example("\udcff"))


def test_a_reference_that_spells_out_its_end_is_learnt_and_scored_with_one_end():
    (example,) = evaluation_set(
        [Example("Why?", responses=("So.<pad><eos>\n", "No.<eos>"))], encoder(TURNS + ASSISTANT)
    ).examples
    assert example.references == ("So.", "No.")
    assert example.response_ids is not None
    assert example.response_ids.count(tiny.PAD) == 1
    assert tiny.EOS not in example.response_ids


@pytest.mark.parametrize(
    ("chat_template", "slug"),
    [
        (TURNS + ASSISTANT, None),
        (tiny.CHAT_TEMPLATE, None),
        (TURNS, "no-generation-prompt"),
        (
            TURNS + "{% if add_generation_prompt %}assistant: <think>\n{% endif %}",
            "opened-thinking",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}<think></think>"
            "{% endif %}{{ m.content }}<pad>\n{% endfor %}" + ASSISTANT,
            "text-before-reference",
        ),
        ("{{ messages|length }}" + TURNS + ASSISTANT, "changed-request"),
        (TURNS.replace("m.content", "m.content|replace('So', 'Ah')") + ASSISTANT, "changed-ref"),
        (TURNS.replace("<pad>", "[end]") + ASSISTANT, "other-end-of-turn"),
    ],
)
def test_what_a_chat_template_does_to_references_is_found(chat_template, slug):
    found = template_findings(encoder(chat_template), SINGLE)
    assert [finding.slug.startswith(slug) for finding in found] == [True] * (slug is not None)


def test_references_that_close_the_thoughts_that_the_prompt_opens_are_right():
    opens = TURNS + "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
    assert template_findings(encoder(opens), Example("a", responses=("hm</think>So.",))) == []


def test_different_chat_templates_of_student_and_teacher_are_said():
    own = encoder(TURNS + ASSISTANT)
    assert template_difference(own, own.tokenizer) is None
    assert "differ ('user: Why?" in str(template_difference(own, tiny.tokenizer(True)))
    refuses_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS
    )
    assert template_difference(own, tokenizer(refuses_system + ASSISTANT)) is None
    assert "has no chat template" in str(template_difference(own, tiny.tokenizer()))
    assert template_difference(encoder(None), tiny.tokenizer(True)) is None


def test_a_student_without_a_chat_template_takes_its_teachers():
    student = tiny.tokenizer()
    assert adopt_chat_template(student, tiny.tokenizer(True))
    assert student.chat_template == tiny.CHAT_TEMPLATE
    assert not adopt_chat_template(student, tokenizer(TURNS))


def kd_recipe(directory):
    tiny.write_data(directory / "train.jsonl")
    raw = tiny.recipe(
        directory,
        method={"name": "kd"},
        data={"template": "auto", "max_request_tokens": 100},
        optimization={"max_steps": 1},
    )
    return recipe_from_dict(raw)


def test_the_teachers_chat_template_is_saved_with_a_student_that_had_none(tmp_path, capsys):
    student, teacher = tiny.save_pair(tmp_path)
    tiny.tokenizer(chat_template=True).save_pretrained(teacher)
    run = train(kd_recipe(tmp_path))
    assert "takes the teacher's, which is saved with it" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(run / "student").chat_template == tiny.CHAT_TEMPLATE
    assert AutoTokenizer.from_pretrained(student).chat_template is None
    assert load_run(run, "a test").encoder.template == "chat"


def test_a_run_renders_its_requests_as_of_the_day_it_began(tmp_path):
    dated = tokenizer("{{ strftime_now('%d %b %Y') }}\n" + TURNS + ASSISTANT)
    for path in tiny.save_pair(tmp_path):
        dated.save_pretrained(path)
    recipe = kd_recipe(tmp_path)
    record = train(recipe) / "environment.json"
    known = json.loads(record.read_text())
    assert known["date"] == datetime.date.today().isoformat()

    record.write_text(json.dumps(known | {"date": "2020-01-02"}))
    assert load_run(record.parent, "a test").encoder.render(SINGLE).startswith("02 Jan 2020\n")
    (record.parent / "summary.json").unlink()
    with pytest.raises(UserError, match="began with other training requests"):
        train(recipe)  # rendered as of the recorded day, they aren't those of the recorded digest


def test_a_mark_of_the_byte_order_is_no_part_of_a_request(tmp_path):
    (tmp_path / "t.jinja").write_bytes("\ufeffQ: {{ instruction }}".encode())
    assert encoder(None, str(tmp_path / "t.jinja")).render(SINGLE) == "Q: Why?"


@pytest.mark.parametrize("place", ["in a turn", "after it"])
def test_half_a_character_of_a_chat_template_is_refused(place):
    half = "{{ '\ud800' }}"
    template = "{% for m in messages %}{{ m.content }}" + (
        half + "{% endfor %}" if place == "in a turn" else "{% endfor %}" + half
    )
    with pytest.raises(UserError, match=r"holds \\ud800 alone"):
        encoder(template).request_ids(SINGLE)


def test_auto_is_the_chat_template_where_there_is_one():
    assert encoder(TURNS).template == "chat"
    assert encoder(None).template == "alpaca"


def test_the_chat_template_is_the_tokenizers_own():
    chat = encoder(tiny.CHAT_TEMPLATE)
    assert chat.render(Example("Add them.", "2")) == "user: Add them.\n\n2\nassistant: "
    turns = (USER, {"role": "assistant", "content": "So."}, {"role": "user", "content": "So?"})
    assert chat.render(Example("So?", messages=turns)) == (
        "user: Why?\nassistant: So.\nuser: So?\nassistant: "
    )


def test_several_turns_need_the_chat_template():
    turns = (USER, {"role": "assistant", "content": "So."}, USER)
    with pytest.raises(UserError, match=r"needs data\.template: chat"):
        encoder(None, "alpaca").render(Example("Why?", messages=turns))


def test_template_options_reach_the_chat_template():
    thinks = "{{ messages[0].content }}{% if thinking %} think{% endif %}"
    assert encoder(thinks, thinking=True).render(SINGLE) == "Why? think"


def test_references_end_as_the_chat_template_ends_a_turn_and_only_once():
    chat = encoder(TURNS + ASSISTANT)
    assert chat.eos_token_id == tiny.PAD
    assert chat.response_ids("a")[-1] == tiny.PAD
    assert chat.response_ids("a<eos>").count(tiny.EOS) == 0
    plain = encoder(None, "none")
    assert plain.response_ids("a<eos>").count(tiny.EOS) == 1
    quoting = evaluation_set([Example("What is <pad>?")], plain)
    assert "1 with special tokens in their texts" in quoting.summary()
