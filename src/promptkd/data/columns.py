"""From a row's columns to a request and its responses. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from promptkd.config import suggest
from promptkd.errors import UserError

PAIRS = (
    ("instruction", ("output", "response")),
    ("prompt", ("completion", "response")),
    ("question", ("answer", "response")),
    ("request", ("response",)),
)
CONVERSATIONS = ("messages", "conversations")
KNOWN = (
    "instruction (input or context; output or response), prompt (completion or response), "
    "question (answer), request (response), messages or conversations"
)
MAPPED = ("request", "response", "input", "system", "messages")
"""What ``data.columns`` may name."""
CARRIERS = ("documents", "passages", "functions", "system_prompt", "images", "audios", "videos")
"""Columns that other tools read as part of the request: refused, since nobody here would."""
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and the reference responses (none, one or several).

    Attributes:
        messages: the turns before the response, when the row came as a conversation, as chat
            templates take them.
        tools: what a chat template is given as tools.
        where: file and line, for complaints.
    """

    instruction: str
    input: str = ""
    responses: tuple[str, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    where: str = field(default="", compare=False)


def example_of(row: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Example:
    """Read a row.

    Args:
        columns: see ``read_noted``.

    Raises:
        UserError: naming ``where``, if the row asks nothing, or holds what can't be read.
    """
    row = _renamed(row, where, columns)
    for name in CARRIERS:
        if row.get(name):
            raise UserError(
                f"{where}: the column '{name}' holds part of the request, and is not read. Put it "
                "into the request, or rename or remove the column."
            )
    tools = tuple(row.get("tools") or ())
    system = _text(row.get("system") or "", "system", where)
    for name in CONVERSATIONS:
        if row.get(name):
            return _conversation(row[name], system, tools, where)
    for request, responses in PAIRS:
        if request not in row:
            continue
        response = next((row[name] for name in responses if row.get(name)), None)
        if isinstance(row[request], list):
            return _conversation([*row[request], *_listed(response)], system, tools, where)
        text = _text(row[request], request, where)
        if not text.strip():
            raise UserError(f"{where}: '{request}' is {text!r}, not a text. Each row asks for one.")
        example = Example(
            instruction=text,
            input=_input(row, where),
            responses=_responses(response, where),
            tools=tools,
            where=where,
        )
        return _with_turns(example, system, row.get("history") or ())
    raise UserError(f"{where}: no request found in the columns {sorted(row)}. Known: {KNOWN}.")


def unread_columns(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Columns that ``example_of`` takes no notice of, in the order they are met."""
    read = {"input", "context", "system", "history", "tools", *CONVERSATIONS, *columns.values()}
    for request, responses in PAIRS:
        read |= {request, *responses}
    return list(dict.fromkeys(name for row in rows for name in row if name not in read))


def _renamed(row: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return dict(row)
    renamed = dict(row)
    for ours, theirs in columns.items():
        if ours not in MAPPED:
            raise UserError(f"data.columns names '{ours}'{suggest(ours, list(MAPPED))}")
        if theirs not in row:
            raise UserError(
                f"{where}: data.columns reads '{ours}' from the column '{theirs}', which isn't "
                f"there. The row has {', '.join(map(str, row))}."
            )
        renamed.pop(theirs, None)
    if "request" in columns:
        for request, responses in PAIRS:
            for name in (request, *responses, *CONVERSATIONS):
                renamed.pop(name, None)
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def _input(row: Mapping[str, Any], where: str) -> str:
    own, context = (_text(row.get(name) or "", name, where) for name in ("input", "context"))
    if own and context:
        raise UserError(
            f"{where}: 'input' and 'context' both hold a text, and a request has one input. "
            "Join them, or name one by data.columns."
        )
    return own or context


def _with_turns(example: Example, system: str, history: Sequence[Any]) -> Example:
    """The same as a conversation, if turns come before it."""
    if not system and not history:
        return example
    turns = [{"role": "system", "content": system}] if system else []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"{example.where}: 'history' is {history!r}, not a list of [request, response]."
            )
        asked, answered = (_text(text, "history", example.where) for text in pair)
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answered})
    asked = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
    turns.append({"role": "user", "content": asked})
    return Example(
        instruction=asked,
        responses=example.responses,
        messages=tuple(turns),
        tools=example.tools,
        where=example.where,
    )


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [{"role": "assistant", "content": value}]


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' is {value!r}, not a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise UserError(
            f"{where}: '{name}' holds half a character ({half!r}). Mend that text."
        ) from None
    return value


def _responses(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "" or value == []:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise UserError(f"{where}: the response is {value!r}, neither a text nor a list of texts.")
    return tuple(_text(item, "response", where) for item in values)


def _conversation(turns: Any, system: str, tools: tuple[Any, ...], where: str) -> Example:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: messages must be a list of {{role, content}} objects.")
    read = [_turn(turn, where) for turn in turns]
    if system:
        if any(turn["role"] == "system" for turn in read):
            raise UserError(
                f"{where}: a system message stands in the conversation and in the column 'system'. "
                "Keep one of them."
            )
        read.insert(0, {"role": "system", "content": system})
    answered = bool(read) and read[-1]["role"] == "assistant"
    if answered and read[-1].get("tool_calls"):
        raise UserError(
            f"{where}: the conversation ends with a tool call, and a response is a text. Leave the "
            "last turn out, or end with the answer."
        )
    before = read[:-1] if answered else read
    if not before or before[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{where}: the conversation has no user turn to respond to.")
    asked = next((t["content"] for t in reversed(before) if t["role"] == "user"), "")
    return Example(
        instruction=asked,
        responses=_responses(read[-1]["content"], where) if answered else (),
        messages=tuple(before),
        tools=tools,
        where=where,
    )


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A turn as chat templates take it; what it holds besides role and content stays."""
    turn = dict(turn)
    if "from" in turn and "value" in turn and "role" not in turn:
        role = turn.pop("from")
        turn = {"role": SHAREGPT.get(role, role), "content": turn.pop("value"), **turn}
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or ("content" not in turn and not turn.get("tool_calls")):
        raise UserError(f"{where}: messages must be a list of {{role, content}} objects.")
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    return turn | {"role": role, "content": _text(content, "content", where)}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise UserError(f"{where}: a turn holds a part of type {kind!r}; only text can be read.")
