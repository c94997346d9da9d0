"""Sets of encoded examples: what was cut or dropped on the way is counted. No torch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from promptkd.data.encoding import EncodedExample, Encoder
from promptkd.data.examples import Example
from promptkd.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """Encoded examples and what had to be cut or dropped on the way.

    Attributes:
        num_shortened_conversations: whose oldest turns were left out.
        num_quoting_markers: whose texts hold the tokenizer's special tokens, read as such.
        num_dropped_for_teacher: whose teacher's request alone is too long.
        num_cut_contexts: whose teacher reads only the beginning of its context.
    """

    examples: tuple[EncodedExample, ...]
    num_dropped_requests: int = 0
    num_cut_requests: int = 0
    num_cut_responses: int = 0
    num_shortened_conversations: int = 0
    num_quoting_markers: int = 0
    num_dropped_for_teacher: int = 0
    num_cut_contexts: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def has_references(self) -> bool:
        """Whether every example has one."""
        return all(example.response_ids is not None for example in self.examples)

    def digest(self) -> str:
        """Equal exactly for equal tokens in equal order."""
        found = hashlib.sha256()
        for example in self.examples:
            row = [example.request_ids, example.response_ids]
            row += [example.teacher_request_ids] if example.teacher_request_ids else []
            found.update(json.dumps(row).encode())
        return found.hexdigest()

    def digest_of_references(self) -> str:
        """Equal exactly for equal texts, of which the first one's tokens are in ``digest``."""
        texts = [example.references for example in self.examples]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    @property
    def has_teacher_requests(self) -> bool:
        """Whether the teacher reads other requests than the student."""
        return any(example.teacher_request_ids is not None for example in self.examples)

    @property
    def longest_teacher_request(self) -> int:
        """Tokens; 0 where the teacher has no request of its own."""
        return max((len(example.teacher_request_ids or ()) for example in self.examples), default=0)

    def summary(self) -> str:
        more = ""
        if self.num_shortened_conversations:
            more += f"; {self.num_shortened_conversations} conversations without oldest turns"
        if self.num_quoting_markers:
            more += f"; {self.num_quoting_markers} with special tokens in their texts, read as such"
        if longest := self.longest_teacher_request:
            more += f"; the teacher's requests have up to {longest} tokens"
        if self.num_dropped_for_teacher:
            more += f"; {self.num_dropped_for_teacher} too long for the teacher, dropped"
        if self.num_cut_contexts:
            more += f"; {self.num_cut_contexts} of the teacher's contexts cut"
        return (
            f"{len(self.examples)} requests ({self.num_dropped_requests} too long, dropped; "
            f"{self.num_cut_requests} cut to fit; {self.num_cut_responses} references cut{more})"
        )


def reads(examples: Iterable[Example], context: str | None) -> bool:
    """Whether there is what the teacher reads beside the request, if it reads any column."""
    return context is None or any(example.teacher_context for example in examples)


def training_set(
    examples: Sequence[Example], encoder: Encoder, teacher: Encoder | None = None
) -> Dataset:
    """Encode for training: requests over the limit are dropped and counted, as the authors do.

    Conversations lose their oldest turns first. ``teacher`` encodes the teacher's requests.

    Raises:
        UserError: if no request is left.
    """
    encoded, shortened, too_long = [], 0, 0
    for index, example in enumerate(examples):
        item = encoder.encode(index, example)
        if len(item.request_ids) > encoder.max_request_tokens and len(example.messages) > 1:
            example = encoder.without_oldest_turns(example)
            item = encoder.encode(index, example)
            shortened += len(item.request_ids) <= encoder.max_request_tokens
        if teacher and len(item.request_ids) <= encoder.max_request_tokens:
            item = replace(item, teacher_request_ids=teacher.request_ids(example))
            if len(item.teacher_request_ids or ()) > teacher.max_request_tokens:
                too_long += 1
                continue
        encoded.append(item)
    kept = tuple(e for e in encoded if len(e.request_ids) <= encoder.max_request_tokens)
    if not kept:
        limits = f"max_request_tokens = {encoder.max_request_tokens}"
        if teacher and too_long:
            limits += f" or teacher.max_request_tokens = {teacher.max_request_tokens}"
        raise UserError(
            f"All {len(examples)} requests are longer than {limits}. Raise it, or bring shorter "
            "requests."
        )
    return Dataset(
        examples=kept,
        num_dropped_requests=len(encoded) - len(kept),
        num_dropped_for_teacher=too_long,
        num_cut_responses=_num_cut_responses(kept, encoder),
        num_shortened_conversations=shortened,
        num_quoting_markers=_num_quoting_markers(examples, encoder),
    )


def evaluation_set(
    examples: Sequence[Example], encoder: Encoder, teacher: Encoder | None = None
) -> Dataset:
    """Encode for evaluation: every request is kept; those over the limit are cut and counted.

    Conversations lose their oldest turns first. ``teacher`` encodes the teacher's requests, in
    which the context is cut.
    """
    encoded, num_cut, shortened, contexts = [], 0, 0, 0
    for index, example in enumerate(examples):
        item = encoder.encode(index, example)
        if len(item.request_ids) > encoder.max_request_tokens and len(example.messages) > 1:
            example = encoder.without_oldest_turns(example)
            item = encoder.encode(index, example)
            shortened += 1
        if len(item.request_ids) > encoder.max_request_tokens:
            example = encoder.cut_to_fit(example)
            item = encoder.encode(index, example)
            num_cut += 1
        if teacher:
            if not teacher.fits(example):
                example = teacher.cut_to_fit(example)
                contexts += 1
            item = replace(item, teacher_request_ids=teacher.request_ids(example))
        encoded.append(item)
    return Dataset(
        examples=tuple(encoded),
        num_cut_requests=num_cut,
        num_cut_contexts=contexts,
        num_cut_responses=_num_cut_responses(encoded, encoder),
        num_shortened_conversations=shortened,
        num_quoting_markers=_num_quoting_markers(examples, encoder),
    )


def _num_cut_responses(examples: Iterable[EncodedExample], encoder: Encoder) -> int:
    return sum(
        example.response_ids is not None and example.response_ids[-1] != encoder.eos_token_id
        for example in examples
    )


def _num_quoting_markers(examples: Iterable[Example], encoder: Encoder) -> int:
    tokenizer = encoder.tokenizer
    added = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    markers = {token for token in (*tokenizer.all_special_tokens, *added) if len(token) > 2}

    def texts(example: Example) -> Iterable[str]:
        yield from (example.instruction, example.input, *example.responses)
        yield from (turn["content"] for turn in example.messages)

    return sum(
        any(marker in text for text in texts(example) for marker in markers) for example in examples
    )
