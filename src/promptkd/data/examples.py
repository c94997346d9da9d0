"""An example: one request with its reference responses, before it becomes tokens."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from promptkd.errors import UserError

Turn = dict[str, Any]
"""One turn of a conversation as chat templates read it: ``role``, ``content``, tool calls."""


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and the reference responses (none, one or several).

    Attributes:
        messages: the turns before the response, when the row is a conversation. The last one is
            the user's (``instruction`` is its text), or a tool's result.
        tools: schemas of the tools that a conversation may call, for the chat template.
        teacher_context: a text that only the teacher reads.
        where: the row's file and line, for messages.
    """

    instruction: str
    input: str = ""
    responses: tuple[str, ...] = ()
    messages: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    teacher_context: str = ""
    where: str = field(default="", compare=False)

    @property
    def at(self) -> str:
        """``file:line: ``, to begin a message with."""
        return f"{self.where}: " if self.where else ""

    def texts(self) -> Iterator[str]:
        """Every text that the user wrote: of the request, its turns and the references."""
        yield from (self.instruction, self.input, *self.responses)
        yield from (turn["content"] for turn in self.messages)
        yield self.teacher_context


def request_text(example: Example) -> str:
    """The request without any template, to compare and to identify it by."""
    if example.messages:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in example.messages)
    return f"{example.instruction}\n{example.input}" if example.input else example.instruction


def content_digest(examples: Iterable[Example]) -> str:
    """SHA-256 of everything a run can learn from the rows, in their order."""
    digest = hashlib.sha256()
    for e in examples:
        row = [e.instruction, e.input, e.responses, e.messages, e.tools]
        row += [e.teacher_context] if e.teacher_context else []
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def refuse_lone_surrogates(text: str, at: str) -> None:
    """Half of a UTF-16 pair is no character, and no tokenizer reads it.

    Raises:
        UserError: naming the row and the code.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{at}the text holds {half} alone, half of a character (a lone surrogate). "
            "Remove or complete it."
        ) from None


def written(example: Example) -> str:
    """Turns and tools as JSON, with all that they hold beside texts: calls, names, thoughts.

    Raises:
        UserError: for what JSON can't hold: a date of a Parquet file, say.
    """
    try:
        return json.dumps([example.messages, example.tools], ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{example.at}a turn or a tool holds what can't be written as JSON ({error}). Make it "
            "a text or a number."
        ) from None
