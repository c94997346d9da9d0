"""What a chat template does to requests and references that would corrupt a run silently.

Found by rendering: a request and its reference, as they are learnt, against the template's own
rendering of the whole conversation; and the student's rendering against its teacher's.
"""

from dataclasses import dataclass
from typing import Any

from promptkd.data.encoding import Encoder
from promptkd.data.examples import Example, Turn
from promptkd.data.templates import chat_turns, render_turns
from promptkd.errors import UserError

_ASKED: tuple[Turn, ...] = ({"role": "user", "content": "Why?"},)
PROBES: tuple[tuple[Turn, ...], ...] = (
    _ASKED,
    (*_ASKED, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}),
    ({"role": "system", "content": "Be brief."}, *_ASKED),
)
"""Conversations that most chat templates take, for comparing two of them."""


@dataclass(frozen=True)
class TemplateFinding:
    """Something that a template does to requests or references.

    Attributes:
        slug: no-generation-prompt | opened-thinking | changed-request | text-before-reference |
            changed-reference | other-end-of-turn.
        sentence: what was found, and what to do.
    """

    slug: str
    sentence: str


def template_findings(encoder: Encoder, example: Example) -> list[TemplateFinding]:
    """Compare request and reference, as they are learnt, with the whole conversation's rendering.

    Empty for other templates than chat, and for an example without a reference.
    """
    if encoder.template != "chat" or not example.responses:
        return []
    reference = encoder.without_end(example.responses[0])
    if not reference.strip():
        return []
    request, turns = encoder.render(example), chat_turns(example)
    if request == _closed(encoder, example, turns):
        return [
            TemplateFinding(
                "no-generation-prompt",
                "the chat template adds no generation prompt, so a request ends where the user's "
                f"turn does ({request[-30:]!r}) and nothing says whose turn it is. Mend the "
                "template: add_generation_prompt has to open the assistant's turn.",
            )
        ]
    answer = {"role": "assistant", "content": reference}
    whole = _closed(encoder, example, [*turns, answer])
    found = _before(request, whole, reference) or _after(encoder, whole, reference)
    return [found] if found else []


def template_difference(encoder: Encoder, teacher_tokenizer: Any) -> str | None:
    """How the teacher's own rendering differs from the student's; None if it doesn't.

    Both models read the student's rendering, so a difference means that the teacher is asked in a
    form that isn't its own.
    """
    if encoder.template != "chat":
        return None
    if not teacher_tokenizer.chat_template:
        return (
            "the teacher's tokenizer has no chat template, so the teacher is asked in the "
            "student's form, which it may not know. Use data.template: alpaca or none for both."
        )
    for probe in PROBES:
        try:
            own, theirs = (
                render_turns(t, [*probe], (), encoder.template_options, encoder.date)
                for t in (encoder.tokenizer, teacher_tokenizer)
            )
        except UserError:
            continue  # a form that one of them refuses is no difference in the others
        if own != theirs:
            return (
                f"the chat templates of student and teacher differ ({own!r:.120} and "
                f"{theirs!r:.120}), and the teacher is asked in the student's form. Give the "
                "student's tokenizer the teacher's chat template unless that is meant."
            )
    return None


def _closed(encoder: Encoder, example: Example, turns: list[Turn]) -> str:
    """A conversation that asks for nothing more."""
    return render_turns(
        encoder.tokenizer,
        turns,
        example.tools,
        encoder.template_options,
        encoder.date,
        generation_prompt=False,
        at=example.where,
    )


def _before(request: str, whole: str, reference: str) -> TemplateFinding | None:
    """Whether the template puts the reference exactly where the request ends."""
    if not whole.startswith(request):
        if not request.rstrip().endswith("<think>"):
            pairs = enumerate(zip(request, whole, strict=False))
            at = next((i for i, (own, other) in pairs if own != other), len(whole))
            return TemplateFinding(
                "changed-request",
                "the chat template renders a request otherwise once a response follows: from "
                f"character {at} on {request[at : at + 40]!r} becomes {whole[at : at + 40]!r}. "
                "What is learnt isn't what the template makes of whole conversations.",
            )
        if "</think>" in reference:
            return None  # it goes on with the thoughts that the request opens
        return TemplateFinding(
            "opened-thinking",
            "the generation prompt opens <think>, which the references never close: they would be "
            "learnt as thoughts. Set data.template_options (enable_thinking: false, where the "
            "template has it), or bring references with their thoughts.",
        )
    between, found, _ = whole[len(request) :].partition(reference.strip())
    if not found:
        return TemplateFinding(
            "changed-reference",
            f"the chat template changes responses: {reference[:40]!r} becomes {between[:40]!r}. "
            "References are learnt as they are in the data.",
        )
    if between.strip():
        return TemplateFinding(
            "text-before-reference",
            f"the chat template puts {between!r} before a response, and references are learnt "
            "without it. Set data.template_options (enable_thinking: false, where the template "
            "has it), or begin the references with it.",
        )
    return None


def _after(encoder: Encoder, whole: str, reference: str) -> TemplateFinding | None:
    """Whether a reference is learnt to end with the token that ends the template's turn."""
    tokenizer, end = encoder.tokenizer, whole.rpartition(reference.strip())[2].strip()
    ids = tokenizer(end, add_special_tokens=False).input_ids
    if not ids or ids[0] == encoder.eos_token_id:
        return None
    return TemplateFinding(
        "other-end-of-turn",
        f"the chat template ends a turn with {end[:30]!r}, but references are learnt to end with "
        f"{tokenizer.convert_ids_to_tokens(encoder.eos_token_id)!r}. Make the template's end of "
        "turn a special token of the tokenizer, or mend the template.",
    )
