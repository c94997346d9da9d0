"""A row's columns become a request and its references; what isn't read is named or refused.

Names that every library uses are recognised; ``data.columns`` maps any other. A column that is
known to carry text of the request (``system``, ``documents``, ...) is used or refused, never
dropped; every other column that isn't read is named once per source.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from promptkd.config import ColumnsSection
from promptkd.data.conversations import as_turns, conversation, history_turns
from promptkd.data.examples import Example, Turn, refuse_lone_surrogates, written
from promptkd.errors import UserError

KNOWN: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "request": ("instruction", "prompt", "question", "request"),
    "context": ("input", "context"),
    "response": ("output", "response", "completion", "answer"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
}
"""The names under which each part of a row is recognised without ``data.columns``."""

CARRIERS = {name for names in KNOWN.values() for name in names} | {
    *("answers", "chosen", "demonstration", "demonstrations", "documents", "document", "examples"),
    *("image", "images", "audio", "video", "passage", "passages", "query", "target", "hint"),
    *("reasoning", "reasoning_content", "thinking", "rationale", "solution", "few_shot"),
    *("choices", "options", "premise", "hypothesis", "article", "story", "paragraph", "paragraphs"),
    *(
        "background",
        "facts",
        "evidence",
        "knowledge",
        "ctxs",
        "contexts",
        "table",
        "schema",
        "code",
    ),
    *("system_message", "system_instruction", "persona", "dialogue", "dialog", "turns", "body"),
    *("inputs", "outputs", "targets", "responses", "completions", "references", "conversations"),
    *("chat_history", "conversation_history", "previous_messages", "developer", "preamble"),
    *("instructions", "task_description", "definition", "explanation", "chain_of_thought", "cot"),
    *("reference", "ground_truth", "gold", "gold_answer", "expected_output", "reply"),
    *("user", "assistant", "human", "tool_calls", "function_call", "available_tools"),
}
"""Columns that carry a part of the request or of its reference, whatever their case: used, or
refused by name."""

SPEAKERS = {"request": "user", "response": "assistant", "system": "system"}
"""Whose words a part of a row is, where it may stand in a conversation again."""

LAYOUTS = (
    "instruction (input or context, output or response), prompt (completion), question (answer), "
    "request (response), messages or conversations"
)


class ColumnReader:
    """Reads the rows of one source, and counts which columns are left unread.

    Args:
        columns: which is what.
        teacher_context: the column that only the teacher reads; it may be the reference too.
    """

    def __init__(self, columns: ColumnsSection, teacher_context: str | None = None):
        self.columns = columns
        self.teacher_context = teacher_context
        self.unread: Counter[str] = Counter()
        self._mapped = {
            part: column for part in KNOWN if (column := getattr(columns, part)) is not None
        }
        self._seen: set[str] = set()

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """The request and references of a row.

        Raises:
            UserError: for a row without a request, with parts that are no text, or with text that
                would be lost; with file and line.
        """
        self._seen.update(row)
        parts = self._parts(row, where)
        values = {part: row[column] for part, column in parts.items()}
        if "messages" in parts:
            example = self._of_messages(values, parts, where)
        elif "request" in parts:
            example = self._of_request(values, parts, where)
        else:
            raise UserError(
                f"{where}: no request found in the columns {list(row)}{self._set_aside(row)}. "
                f"Known: {LAYOUTS}. data.columns maps others, as in {{request: my_column}}."
            )
        if self.teacher_context and not _is_empty(context := row.get(self.teacher_context)):
            example = replace(example, teacher_context=self._context(context, where))
        for text in (*example.texts(), written(example)):
            refuse_lone_surrogates(text, example.at)
        known = {*parts.values(), *self.columns.ignore, self.teacher_context}
        left = [c for c in row if c not in known]
        left = [column for column in left if not _is_empty(row[column])]
        for column in left:
            says = not isinstance(row[column], (int, float))  # a number is no text
            name = str(column).casefold()
            if says and name in CARRIERS and not _is_repeated(name, row[column], example):
                raise _lost(where, column, "the request is read without it")
        self.unread.update(left)
        return example

    def _parts(self, row: Mapping[str, Any], where: str) -> dict[str, str]:
        """Which column of the row is which of its parts."""
        of_messages = ("messages", "response", "system", "tools")
        of_request = ("request", "context", "response", "system", "history", "tools")
        mapped = self._mapped.get("request") in row
        turns = None if mapped else self._find("messages", row, where)
        wanted = of_messages if turns else of_request
        return {part: name for part in wanted if (name := self._find(part, row, where))}

    def _set_aside(self, row: Mapping[str, Any]) -> str:
        """Which columns can't be the request, because the recipe says otherwise."""
        ignored = [
            f"'{name}' is in data.columns.ignore" for name in self.columns.ignore if name in row
        ]
        if self.teacher_context in row:
            ignored.append(f"'{self.teacher_context}' is teacher.context, for the teacher alone")
        return f" ({'; '.join(ignored)})" if ignored else ""

    def _context(self, value: Any, where: str) -> str:
        """One text, or several one after the other."""
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: '{self.teacher_context}', which teacher.context names, is "
                f"{value!r:.80}, neither a text nor a list of texts."
            )
        return "\n\n".join(texts)

    def check_mapping(self, source: str) -> str | None:
        """A sentence where nothing of ``data.columns`` is in the source, as in a public test set.

        Raises:
            UserError: if some of it is and some isn't, naming the column that is missing.
        """
        named = {*self._mapped.values(), *self.columns.ignore}
        missing = sorted(named - self._seen)
        if missing and named & self._seen:
            raise UserError(
                f"data.columns names '{missing[0]}', but {source} has only the columns "
                f"{', '.join(sorted(self._seen))}."
            )
        return f"has none of data.columns ({', '.join(missing)})" if missing else None

    def _find(self, part: str, row: Mapping[str, Any], where: str) -> str | None:
        """The column of a part of the row; an empty one only where a request should be."""
        if self._mapped.get(part) in row:
            names = [self._mapped[part]]
        else:
            taken = {*self._mapped.values(), *self.columns.ignore}
            taken |= {self.teacher_context} if part != "response" else set()
            names = [name for name in KNOWN[part] if name not in taken]
        present = [name for name in names if name in row]
        filled = [name for name in present if not _is_empty(row[name])]
        if len(filled) > 1:
            raise UserError(
                f"{where}: {' and '.join(map(repr, filled))} could each be the {part}. Say which "
                f"is: data.columns: {{{part}: {filled[0]}, ignore: [{', '.join(filled[1:])}]}}."
            )
        if filled:
            return filled[0]
        return present[0] if present and part == "request" else None

    def _of_messages(self, values: dict[str, Any], parts: dict[str, str], where: str) -> Example:
        turns = as_turns(values["messages"], where, self.unread)
        if turns[-1]["role"] == "assistant":
            parts.pop("response", None)  # the last turn is the reference
        answers = _responses(values["response"], where) if "response" in parts else ()
        turns = _with_system(turns, values.get("system"), where)
        return conversation(turns, answers, _tools(values.get("tools"), where), where)

    def _of_request(self, values: dict[str, Any], parts: dict[str, str], where: str) -> Example:
        column, request, responses = parts["request"], values["request"], values.get("response")
        context = values.get("context", "")
        if not isinstance(context, str):
            raise UserError(f"{where}: '{parts['context']}' is {context!r:.80}, not a text.")
        if isinstance(request, list) and request and isinstance(request[0], dict):
            turns = as_turns(request, where, self.unread)
            if context:
                raise _lost(where, parts["context"], f"'{column}' is a conversation")
            if isinstance(responses, list) and isinstance(responses[0], dict):
                turns, responses = [*turns, *as_turns(responses, where, self.unread)], None
                if turns[-1]["role"] != "assistant":
                    raise UserError(
                        f"{where}: '{parts['response']}' ends with a turn of "
                        f"'{turns[-1]['role']}'. The reference is the assistant's last turn."
                    )
        elif isinstance(request, str) and request.strip():
            asked = f"{request}\n\n{context}" if context else request
            turns = [{"role": "user", "content": asked}]
        else:
            raise UserError(
                f"{where}: '{column}' is {request!r:.80}, not a text. Each row asks for one."
            )
        answers = _responses(responses, where)
        if isinstance(request, str) and not {"system", "history", "tools"} & {*parts}:
            return Example(request, context, answers, where=where)
        turns = [*history_turns(values.get("history", []), where, self.unread), *turns]
        turns = _with_system(turns, values.get("system"), where)
        return conversation(turns, answers, _tools(values.get("tools"), where), where)


def _lost(where: str, column: str, reason: str) -> UserError:
    return UserError(
        f"{where}: the text in '{column}' would be lost, because {reason}. Say what it is in "
        f"data.columns, as in {{context: {column}}}, or drop it by {{ignore: [{column}]}}; for the "
        f"teacher alone there is teacher.context: {column}."
    )


def _is_empty(value: Any) -> bool:
    """Whether there is nothing to read; a text of white space says nothing."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, tuple, dict)) and not value)


def _is_repeated(column: str, value: Any, example: Example) -> bool:
    """Whether a column only repeats a turn: a prompt beside its conversation, say.

    A text that occurs somewhere in the request proves nothing: it may be there by chance.
    """
    speaker = next((who for part, who in SPEAKERS.items() if column in KNOWN[part]), None)
    said = {turn["content"].strip() for turn in example.messages if turn["role"] == speaker}
    said |= {text.strip() for text in example.responses if speaker == "assistant"}
    return isinstance(value, str) and value.strip() in said


def _with_system(turns: list[Turn], system: Any, where: str) -> list[Turn]:
    if _is_empty(system):
        return turns
    if not isinstance(system, str):
        raise UserError(f"{where}: the system message is {system!r:.80}, not a text.")
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"].strip() == system.strip():
        return turns
    raise UserError(
        f"{where}: the row has a system message of its own and a system turn in its conversation. "
        "Keep one of them."
    )


def _tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Schemas of tools, given as they are or as JSON, as files with columns hold them."""
    if _is_empty(value):
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: the tools aren't JSON: {value[:80]!r}.") from None
    if not isinstance(value, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", {}), dict) for tool in value
    ):
        raise UserError(f"{where}: the tools are {value!r:.80}, not a list of objects.")
    return tuple(value)


def _responses(value: Any, where: str) -> tuple[str, ...]:
    if _is_empty(value):
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise UserError(
            f"{where}: the response is {value!r:.80}, neither a text nor a list of texts."
        )
    return tuple(item for item in values if not _is_empty(item))
