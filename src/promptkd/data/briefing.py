"""What only the teacher reads: a system message, and how request and context become its request.

    the student's request   x
    the teacher's request   x with the system message, its user turn made by ``context_template``

No torch.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jinja2

from promptkd.config import TeacherSection
from promptkd.data.examples import Example, Turn
from promptkd.data.templates import AS_IT_IS, SANDBOX, chat_turns, line_of
from promptkd.errors import UserError

DEFAULT_TEMPLATE = (
    "{{ request }}{% if context %}\n\n"
    "This may help; the answer must not mention it:\n{{ context }}{% endif %}"
)
"""How a request and a context are put together where a recipe doesn't say."""
VARIABLES = ("request", "instruction", "input", "context", "response")


@dataclass(frozen=True)
class Briefing:
    """The texts of a recipe's teacher section, read from their files.

    Attributes:
        system: stands before the row's own system message, if it has one.
        template: Jinja text over ``VARIABLES``: ``request`` is instruction and input together,
            ``response`` the first reference. What isn't there is empty.
        file: the template's, if it is one.
    """

    system: str = ""
    template: str = "{{ request }}"
    file: str = ""

    @classmethod
    def of(cls, section: TeacherSection) -> "Briefing":
        """What ``teacher.system`` and ``teacher.context_template`` hold or name.

        Raises:
            UserError: for a file that isn't there, and for what is no template.
        """
        own, file = section.context_template, ""
        template = DEFAULT_TEMPLATE if section.context else "{{ request }}"
        if own is not None:
            template = _text_or_file(own, "teacher.context_template")
            file = own if template != own else ""
        _compiled(template, file)
        system = "" if section.system is None else _text_or_file(section.system, "teacher.system")
        return cls(system.strip(), template, file)

    def example(self, example: Example) -> Example:
        """The row as the teacher is asked it; the row itself where nothing is added.

        Raises:
            UserError: if the template fails on it, or makes an empty request of it.
        """
        turns = example.messages
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        plain = AS_IT_IS.render(replace(example, messages=(), tools=()))
        asked = plain if last is None else turns[last]["content"]
        written = self._user_turn(example, asked)
        if written != asked:
            turns = _with_turn(turns, last, written)
            example = replace(example, instruction=written, input="", messages=turns)
        return self._with_system(example) if self.system else example

    def _user_turn(self, example: Example, asked: str) -> str:
        values = {
            "request": asked,
            "instruction": example.instruction,
            "input": example.input,
            "context": example.teacher_context,
            "response": example.responses[0] if example.responses else "",
        }
        try:
            written = _compiled(self.template, self.file).render(**values)
        except Exception as error:  # the template is the user's program and may raise anything
            said = str(error) or type(error).__name__
            raise UserError(
                f"{example.at}{_called(self.file)} fails{line_of(error)}: {said}. It may use "
                f"{', '.join(VARIABLES)}."
            ) from None
        if not written.strip():
            raise UserError(
                f"{example.at}teacher.context_template leaves nothing of the request. Put "
                "{{ request }} into it."
            )
        return written

    def _with_system(self, example: Example) -> Example:
        turns = example.messages or tuple(chat_turns(example))
        own = ""
        if turns[0]["role"] == "system":
            own, turns = f"\n\n{turns[0]['content']}", turns[1:]
        system: Turn = {"role": "system", "content": self.system + own}
        return replace(example, messages=(system, *turns))


def _with_turn(turns: tuple[Turn, ...], place: int | None, text: str) -> tuple[Turn, ...]:
    if place is None:
        return turns
    return (*turns[:place], {**turns[place], "content": text}, *turns[place + 1 :])


@cache
def _compiled(text: str, file: str) -> jinja2.Template:
    try:
        return SANDBOX.from_string(text)
    except Exception as error:  # Jinja's own, and what Python says of the code made of it
        raise UserError(
            f"{_called(file)} is no Jinja template{line_of(error)}: {error}. As in "
            f"{DEFAULT_TEMPLATE!r}."
        ) from None


def _called(file: str) -> str:
    """The template's key, and its file."""
    return f"teacher.context_template {file}".rstrip()


def _text_or_file(given: str, key: str) -> str:
    """What a file of that name holds; any other text stands for itself.

    Raises:
        UserError: for what looks like the name of a file, and isn't there or isn't text.
    """
    is_line = len(given) < 256 and not any(mark in given for mark in "\n{")
    path = Path(given)
    try:
        path = path.expanduser() if is_line else path
        if is_line and path.is_file():
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{key} {given} is not UTF-8 text. Save it as UTF-8.") from None
    except (OSError, RuntimeError) as error:  # the latter of a ~user that isn't there
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key} {given} can't be read: {reason}.") from None
    if is_line and " " not in given and (path.suffix or "/" in given):
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{key} {given} {what}. Name a text file, or write the text here.")
    return given
