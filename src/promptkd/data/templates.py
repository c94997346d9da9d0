"""From a request to the text that a model reads, up to where the response begins. No torch."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from promptkd.data.examples import Example, Turn
from promptkd.errors import UserError

ALPACA = (
    "Below is an instruction that describes a task"
    "{% if input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n"
    "{% if input %}### Input:\n{{ input }}\n\n{% endif %}### Response:\n"
)
VERBATIM = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
CLOCK = "strftime_now"
"""The name by which chat templates ask for today's date."""
NAMES = "auto, alpaca, chat, none or a Jinja file"
SANDBOX = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)
"""Where templates that users write run: they see their variables and nothing else."""


def resolved(template: str, tokenizer: Any) -> str:
    """What ``auto`` stands for: the tokenizer's chat template where it has one, else alpaca.

    Raises:
        UserError: if ``chat`` is asked for and the tokenizer has no chat template.
    """
    if template == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "data.template is 'chat', but this tokenizer has no chat template. "
            "Use 'auto', which gives the student its teacher's where it has none, or 'alpaca', "
            "'none' or a template file."
        )
    return template


def adopt_chat_template(tokenizer: Any, teacher_tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template its teacher's, and say whether that was done.

    It is saved with the student then, which is asked in the same form ever after.
    """
    if tokenizer.chat_template or not teacher_tokenizer.chat_template:
        return False
    tokenizer.chat_template = teacher_tokenizer.chat_template
    return True


def render(template: str, example: Example) -> str:
    """A request by one of the named templates, or by a file's.

    Raises:
        UserError: if the template fails or leaves out the input, or the row is a conversation,
            which these can't hold.
    """
    example, whole = _single_turn(example), template_of(template)
    try:
        written = whole.render(instruction=example.instruction, input=example.input)
        without = whole.render(instruction=example.instruction, input="")
    except Exception as error:  # the template is the user's program and may raise anything
        said = str(error) or type(error).__name__
        raise UserError(f"{example.at}data.template {template} fails: {said}. Mend it.") from None
    if example.input.strip() and written == without:
        raise UserError(
            f"{example.at}data.template {template} leaves out this row's input. Put "
            "{{ input }} into it."
        )
    return written


def render_chat(
    tokenizer: Any, example: Example, options: Mapping[str, Any], date: datetime.date
) -> str:
    """A request by the tokenizer's chat template as of ``date``, with the generation prompt.

    Raises:
        UserError: with the template's own words, if it refuses the conversation.
    """
    turns = chat_turns(example)
    return render_turns(tokenizer, turns, example.tools, options, date, at=example.where)


def render_turns(
    tokenizer: Any,
    turns: list[Turn],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    date: datetime.date,
    *,
    generation_prompt: bool = True,
    at: str = "",
) -> str:
    """The same for any turns, which may end with the assistant's."""
    arguments = {**options, "tools": list(tools) or None, CLOCK: date.strftime}
    return apply_chat_template(
        tokenizer, turns, at, add_generation_prompt=generation_prompt, **arguments
    )


def chat_turns(example: Example) -> list[Turn]:
    """The turns of a request; one of instruction and input is a single user turn."""
    if example.messages:
        return list(example.messages)
    return [{"role": "user", "content": render("none", replace(example, tools=()))}]


def apply_chat_template(tokenizer: Any, turns: list[Turn], where: str, **options: Any) -> str:
    """The tokenizer's own, whose complaints become sentences."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # the template is a program that came with a model
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f'{where or "A request"}: the chat template refuses the turns {roles}: "{error}". '
            "Change or leave out that row, or use a template that takes such turns."
        ) from None


def check_options(template: str, tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that nothing reads.

    Raises:
        UserError: naming the option.
    """
    if options and template != "chat":
        raise UserError(
            f"data.template_options ({', '.join(options)}) belong to a chat template, but "
            f"data.template is '{template}'. Remove them."
        )
    for name in options:
        if name not in str(tokenizer.chat_template):
            raise UserError(
                f"data.template_options.{name}: the tokenizer's chat template never reads "
                f"'{name}'. Remove or correct it."
            )


def refuse_lost_text(text: str, example: Example) -> None:
    """Refuse a chat template's rendering that leaves out what the conversation says.

    The thoughts of earlier turns may go: templates of reasoning models drop them by design.

    Raises:
        UserError: naming the turn or the tool.
    """
    for turn in chat_turns(example):
        said = turn["content"].rpartition("</think>")[2].strip()
        calls = [_name(call) for call in turn.get("tool_calls", ())]
        for part in (said, *calls):
            if part not in text:
                raise UserError(
                    f"{example.at}the chat template leaves out {part[:60]!r} of a turn of "
                    f"'{turn['role']}'. Use a template that holds such turns, or remove the row."
                )
    for name in map(_name, example.tools):
        if name not in text:
            raise UserError(
                f"{example.at}the chat template leaves out the tool '{name}'. Use a template "
                "that holds tools, or data.columns: {ignore: [tools]}."
            )


def _name(tool: Mapping[str, Any]) -> str:
    """The name of a tool or of a call, in OpenAI's form or alone."""
    return str(tool.get("function", tool).get("name", ""))


@cache
def template_of(name: str) -> jinja2.Template:
    """The template of a name: ``alpaca``, ``none``, or a Jinja file, which runs in a sandbox.

    Raises:
        UserError: if it is none of these, or no template.
    """
    text = {"alpaca": ALPACA, "none": VERBATIM}.get(name)
    if text is None:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"data.template {name} is not UTF-8 text. Save it as UTF-8.") from None
        except OSError:
            raise UserError(
                f"data.template '{name}' is neither {NAMES.removesuffix(' or a Jinja file')} nor "
                "an existing Jinja file."
            ) from None
    try:
        reads = jinja2.meta.find_undeclared_variables(SANDBOX.parse(text))
        if "instruction" not in reads:
            raise UserError(
                f"data.template {name} never reads 'instruction', which is the request."
            )
        return SANDBOX.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(f"data.template {name} fails: {error}.") from None


def _single_turn(example: Example) -> Example:
    roles = [turn["role"] for turn in example.messages]
    if example.tools or (roles and roles != ["user"]):
        beyond = "tools" if example.tools else f"the turns {roles}"
        raise UserError(
            f"{example.at}a conversation with {beyond} "
            "needs data.template: chat; the other templates hold a single user turn."
        )
    if not example.messages:
        return example
    return replace(example, instruction=example.messages[0]["content"], input="", messages=())
