"""Conversations: turns in the forms that libraries write them, and what is asked by the last one.

Turns are kept as chat templates read them. What no template could render (images, a call of a
tool as a reference) is refused by name.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from promptkd.data.examples import Example, Turn
from promptkd.errors import UserError

READ_BY_TEMPLATES = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What a turn may have beside its role and content; other keys are counted as not read."""

CARRIERS = {
    *("audio", "context", "documents", "function_call", "functions", "image", "images", "parts"),
    *("reasoning", "refusal", "tool_result", "tool_results", "tools", "video"),
}
"""Keys of a turn that carry what was said, and that no template reads: refused by name."""

ASKING = ("user", "tool", "function", "ipython")
"""Whose turns are responded to."""

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def as_turns(value: Any, where: str, unread: Counter[str], *, past: bool = False) -> list[Turn]:
    """Turns of ``{role, content}``, or ShareGPT's ``{from, value}``, as templates read them.

    Args:
        past: whether none of them is the reference, so that no mark says anything about learning.

    Raises:
        UserError: for anything else, with file and line.
    """
    if isinstance(value, str):  # files with columns hold conversations as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: the conversation is a text that isn't JSON.") from None
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: messages must be a list of {{role, content}} objects.")
    turns = [_turn(item, where, unread) for item in value]
    if not past and turns[-1]["role"] == "assistant":
        _refuse_marks(value[-1], where)
    return turns


def _refuse_marks(reference: dict[str, Any], where: str) -> None:
    """A last assistant turn is learnt from whole, so what says otherwise isn't passed over."""
    if reference.get("weight") == 0:
        mark = "weight 0, which says that it isn't to be learnt"
    elif reference.get("prefix"):
        mark = "prefix true, which says that a response goes on from it"
    else:
        return
    raise UserError(
        f"{where}: the last assistant turn has {mark}; it would be learnt as the reference. Take "
        "out the turn, or the mark."
    )


def history_turns(value: Any, where: str, unread: Counter[str]) -> list[Turn]:
    """What was said before: pairs of request and response, or turns.

    Raises:
        UserError: for anything else, with file and line.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return as_turns(value, where, unread, past=True)
    pairs = value if isinstance(value, list) else [value]
    turns: list[Turn] = []
    for pair in pairs:
        if not (
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise UserError(
                f"{where}: the history holds {pair!r:.80}. It is a list of [request, response] "
                "pairs, or of {role, content} objects."
            )
        turns.append({"role": "user", "content": pair[0]})
        turns.append({"role": "assistant", "content": pair[1]})
    return turns


def conversation(
    turns: Sequence[Turn], answers: tuple[str, ...], tools: tuple[dict[str, Any], ...], where: str
) -> Example:
    """The turns up to the last request; a last assistant turn is the reference.

    Raises:
        UserError: if nothing is asked, or the reference is more than a text.
    """
    before = tuple(turns)
    if before[-1]["role"] == "assistant":
        last, before = before[-1], before[:-1]
        beyond = [key for key in last if key not in ("role", "content", "name")]
        if beyond:
            raise UserError(
                f"{where}: the last turn, the reference, has {', '.join(beyond)} beside its text. "
                "References are texts: put what is to be learnt into its content."
            )
        answers = (last["content"],) if last["content"].strip() else ()
    if not before or before[-1]["role"] not in ASKING:
        last = f"the last one before is of '{before[-1]['role']}'" if before else "there is none"
        raise UserError(
            f"{where}: the conversation has no user turn to respond to: {last}. It should be of "
            f"{', '.join(ASKING)}."
        )
    if before[-1]["role"] == "user" and not before[-1]["content"].strip():
        raise UserError(f"{where}: the last user turn is empty, so nothing is asked.")
    return Example(before[-1]["content"], "", answers, messages=before, tools=tools, where=where)


def _turn(item: Any, where: str, unread: Counter[str]) -> Turn:
    if not isinstance(item, dict):
        raise UserError(f"{where}: messages must be a list of {{role, content}} objects.")
    item = {key: value for key, value in item.items() if value is not None}
    read = {*READ_BY_TEMPLATES, *(("role", "content") if "role" in item else ("from", "value"))}
    if "role" in item:
        role, content = item["role"], item.get("content")
    else:
        role, content = _sharegpt_role(item.get("from"), where), item.get("value")
    if content is None and item.get("tool_calls"):
        content = ""
    text = _text(content, where)
    if not isinstance(role, str) or text is None:
        raise UserError(
            f"{where}: messages must be a list of {{role, content}} objects, each with a text; one "
            f"is {item!r:.80}."
        )
    for key in item:
        if key not in read and str(key).casefold() in CARRIERS and item[key]:
            raise UserError(
                f"{where}: a turn of '{role}' has {key!r}, which would be lost. Write it into its "
                "content or tool_calls, or take it out."
            )
    kept = {key: item[key] for key in READ_BY_TEMPLATES if item.get(key)}
    unread.update(f"messages[].{key}" for key in item if key not in read)
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(kept["tool_calls"], where)
    return {"role": role, "content": text, **kept}


def _sharegpt_role(name: Any, where: str) -> str | None:
    if name is None:
        return None
    if isinstance(name, str) and name in SHAREGPT_ROLES:
        return SHAREGPT_ROLES[name]
    raise UserError(
        f"{where}: a turn is from {name!r}; known: {', '.join(SHAREGPT_ROLES)}. Write others as "
        "{role, content}, with tool_calls where a tool is called."
    )


def _text(content: Any, where: str) -> str | None:
    """The content, whose parts are joined by newlines, as servers do for templates of texts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: a turn holds a part of type {kind!r}; only text can be read. Remove the "
                "row, or describe the part in words."
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: templates write them as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls is {calls!r:.80}, not a list of objects.")
    made = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict):
            raise UserError(f"{where}: a tool call has the function {function!r:.80}: no object.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = {**function, "arguments": json.loads(arguments)}
            except (ValueError, RecursionError):
                raise UserError(
                    f"{where}: the arguments of a tool call aren't JSON: {arguments[:80]!r}."
                ) from None
        made.append({**call, "function": function} if "function" in call else function)
    return made
