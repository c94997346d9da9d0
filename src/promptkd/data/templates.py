"""From a request to the text that a model reads, up to where the response begins. No torch."""

import datetime
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
DATA, TEACHER = "data.template", "teacher.template"
"""The keys of a recipe that name a template."""
CHAT = {DATA: "the chat template", TEACHER: "the chat template that the teacher is asked by"}
"""What a chat template is called in complaints, by the key that asked for it."""
SANDBOX = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)
"""Where templates that users write run: they see their variables and nothing else."""


def resolved(template: str, tokenizer: Any, key: str = DATA) -> str:
    """What ``auto`` stands for: the tokenizer's chat template where it has one, else alpaca.

    Raises:
        UserError: if ``chat`` is asked for and the tokenizer has no chat template.
    """
    if template == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat" and not tokenizer.chat_template:
        if key == TEACHER:
            raise UserError(
                "The teacher is to be asked by a chat template (teacher.template, or else "
                "data.template), but its tokenizer has none. Set teacher.template: alpaca, none "
                "or a template file."
            )
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


@dataclass(frozen=True)
class Wording:
    """A template over ``instruction`` and ``input``.

    Attributes:
        name: ``alpaca``, ``none`` or the file.
        key: of the recipe, that named it.
    """

    name: str
    key: str
    template: jinja2.Template

    def render(self, example: Example) -> str:
        """A request in these words.

        Raises:
            UserError: if the template fails or leaves out the input, or the row is a conversation,
                which these can't hold.
        """
        example = _single_turn(example, self.key)
        try:
            written, without = (
                self.template.render(instruction=example.instruction, input=text)
                for text in (example.input, "")
            )
        except Exception as error:  # the template is the user's program and may raise anything
            said, line = str(error) or type(error).__name__, line_of(error)
            raise UserError(
                f"{example.at}{self.key} {self.name} fails{line}: {said}. Mend it."
            ) from None
        if example.input.strip() and written == without:
            raise UserError(
                f"{example.at}{self.key} {self.name} leaves out this row's input. Put "
                "{{ input }} into it."
            )
        return written


AS_IT_IS = Wording("none", DATA, SANDBOX.from_string(VERBATIM))
"""The request, and its input after an empty line."""


def render_chat(
    tokenizer: Any,
    example: Example,
    options: Mapping[str, Any],
    date: datetime.date,
    key: str = DATA,
) -> str:
    """A request by the tokenizer's chat template as of ``date``, with the generation prompt.

    Raises:
        UserError: with the template's own words, if it refuses the conversation; and if it leaves
            out a part of it.
    """
    turns = chat_turns(example)
    text = render_turns(
        tokenizer, turns, example.tools, options, date, at=example.where, whose=CHAT[key]
    )
    _refuse_lost_text(text, example, CHAT[key])
    return text


def render_turns(
    tokenizer: Any,
    turns: list[Turn],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    date: datetime.date,
    *,
    generation_prompt: bool = True,
    at: str = "",
    whose: str = CHAT[DATA],
) -> str:
    """The same for any turns, which may end with the assistant's."""
    arguments = {**options, "tools": list(tools) or None, CLOCK: date.strftime}
    where = f"{at or 'A request'}: {whose}"
    return apply_chat_template(
        tokenizer, turns, where, add_generation_prompt=generation_prompt, **arguments
    )


def chat_turns(example: Example) -> list[Turn]:
    """The turns of a request; one of instruction and input is a single user turn."""
    if example.messages:
        return list(example.messages)
    return [{"role": "user", "content": AS_IT_IS.render(replace(example, tools=()))}]


def apply_chat_template(tokenizer: Any, turns: list[Turn], which: str, **options: Any) -> str:
    """The tokenizer's own, whose complaints become sentences that begin with ``which`` it is."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # the template is a program that came with a model
        roles = ", ".join(turn["role"] for turn in turns)
        verb, remedy = "fails on", "Mend the template"
        if type(error) is jinja2.TemplateError:  # its own raise_exception
            verb, remedy = "refuses", "Change or leave out that row"
        raise UserError(
            f'{which} {verb} the turns {roles}: "{error}"{line_of(error)}. {remedy}, or use a '
            "template that takes such turns."
        ) from None


def reads_option(tokenizer: Any, name: str) -> bool:
    """Whether the tokenizer's chat template may ask for an option of that name."""
    return name in str(tokenizer.chat_template)


def check_options(
    template: str, tokenizer: Any, options: Mapping[str, Any], key: str = DATA
) -> None:
    """Refuse options that nothing reads.

    Raises:
        UserError: naming the option.
    """
    if options and template != "chat":
        raise UserError(
            f"{key}_options ({', '.join(options)}) belong to a chat template, but "
            f"{key} is '{template}'. Remove them."
        )
    for name in options:
        if not reads_option(tokenizer, name):
            raise UserError(
                f"{key}_options.{name}: {CHAT[key]} never reads '{name}'. Remove or correct it."
            )


def _refuse_lost_text(text: str, example: Example, which: str) -> None:
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
                    f"{example.at}{which} leaves out {part[:60]!r} of a turn of "
                    f"'{turn['role']}'. Use a template that holds such turns, or remove the row."
                )
    for name in map(_name, example.tools):
        if name not in text:
            raise UserError(
                f"{example.at}{which} leaves out the tool '{name}'. Use a template "
                "that holds tools, or data.columns: {ignore: [tools]}."
            )


def _name(tool: Mapping[str, Any]) -> str:
    """The name of a tool or of a call, in OpenAI's form or alone."""
    return str(tool.get("function", tool).get("name", ""))


def template_of(name: str, key: str = DATA) -> Wording:
    """The template of a name: ``alpaca``, ``none``, or a Jinja file, which runs in a sandbox.

    Raises:
        UserError: if it is none of these, or no template.
    """
    text = {"alpaca": ALPACA, "none": VERBATIM}.get(name)
    if text is None:
        text = _text_of(name, key)
    try:
        reads = jinja2.meta.find_undeclared_variables(SANDBOX.parse(text))
        template = SANDBOX.from_string(text)
    except Exception as error:  # Jinja's own, and what Python says of the code made of it
        raise UserError(f"{key} {name} fails{line_of(error)}: {error}. Mend it.") from None
    if "instruction" not in reads:
        raise UserError(f"{key} {name} never reads 'instruction', which is the request.")
    return Wording(name, key, template)


def _text_of(name: str, key: str) -> str:
    try:
        # a byte order mark is no part of a request
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{key} {name} is not UTF-8 text. Save it as UTF-8.") from None
    except (OSError, RuntimeError) as error:  # the latter of a ~user that isn't there
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{key} '{name}' is neither auto, alpaca, chat, none nor an existing Jinja file "
            f"({reason})."
        ) from None


def line_of(error: Exception) -> str:
    """In which line of a template, in words, where an error of it says one."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f" in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" in line {lines[-1]}" if lines else ""


def _single_turn(example: Example, key: str) -> Example:
    roles = [turn["role"] for turn in example.messages]
    if example.tools or (roles and roles != ["user"]):
        beyond = "tools" if example.tools else f"the turns {roles}"
        raise UserError(
            f"{example.at}a conversation with {beyond} "
            f"needs {key}: chat; the other templates hold a single user turn."
        )
    if not example.messages:
        return example
    return replace(example, instruction=example.messages[0]["content"], input="", messages=())
