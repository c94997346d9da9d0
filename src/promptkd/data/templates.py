"""From a request to the text that a model reads, up to where the response begins. No torch."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from promptkd.data.examples import Example
from promptkd.errors import UserError

ALPACA = (
    "Below is an instruction that describes a task"
    "{% if input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n"
    "{% if input %}### Input:\n{{ input }}\n\n{% endif %}### Response:\n"
)
VERBATIM = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
NAMES = "auto, alpaca, chat, none or a Jinja file"


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
            "Use 'alpaca', 'none' or a template file, or copy the chat_template of a related "
            "model's tokenizer into this one's directory (of an instruct teacher, say)."
        )
    return template


def render(template: str, example: Example) -> str:
    """A request by one of the named templates, or by a file's.

    Raises:
        UserError: if the template fails, or the row is a conversation, which these can't hold.
    """
    example = _single_turn(example)
    try:
        return template_of(template).render(instruction=example.instruction, input=example.input)
    except jinja2.TemplateError as error:
        raise UserError(f"data.template {template} fails: {error}.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"data.template {template} fails: {error}.") from None


def render_chat(tokenizer: Any, example: Example, options: dict[str, Any]) -> str:
    """A conversation by the tokenizer's chat template, with the generation prompt.

    Raises:
        UserError: with the template's own words, if it refuses the conversation.
    """
    alone = {"role": "user", "content": render("none", example)} if not example.messages else {}
    turns = list(example.messages) or [alone]
    arguments = {**options, **({"tools": list(example.tools)} if example.tools else {})}
    return apply_chat_template(
        tokenizer, turns, example.where, add_generation_prompt=True, **arguments
    )


def apply_chat_template(
    tokenizer: Any, turns: list[dict[str, Any]], where: str, **options: Any
) -> str:
    """The tokenizer's own, whose complaints become sentences."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f'{where or "A request"}: the chat template refuses the turns {roles}: "{error}". '
            "Change or leave out that row, or use a template that takes such turns."
        ) from None


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
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(f"data.template {name} fails: {error}.") from None


def _single_turn(example: Example) -> Example:
    if not example.messages:
        return example
    roles = [turn["role"] for turn in example.messages]
    if roles != ["user"]:
        place = f"{example.where}: a" if example.where else "A"
        raise UserError(
            f"{place} conversation with the turns {roles} "
            "needs data.template: chat; the other templates hold a single user turn."
        )
    return Example(example.messages[0]["content"], responses=example.responses)
