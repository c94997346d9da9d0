"""The rows of a whole path: what is learnt from, what chooses the student, what is held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.data import Encoder, Example, content_digest, overlap, read_examples, split_by_digest
from promptkd.errors import UserError
from promptkd.files import write_json_lines

HELD_OUT = 0.1
"""Share of the requests that is never trained on, where no held-out file is given."""
NUM_VALIDATION = 64
"""Requests that choose the student, at most; a tenth of the rest where there are few."""
LONG = 0.99
"""The share of requests, and of references, that the limits on lengths leave whole."""


@dataclass(frozen=True)
class Rows:
    """Training, validation and held-out rows; no request is in two of them."""

    train: list[Example]
    validation: list[Example]
    held_out: list[Example]
    notes: tuple[str, ...]

    @property
    def has_references(self) -> bool:
        return all(example.responses for example in [*self.train, *self.validation])

    def digest(self) -> str:
        return content_digest([*self.train, *self.validation, *self.held_out])

    def write(self, directory: Path) -> None:
        for name in ("train", "validation", "held_out"):
            write_json_lines(directory / f"{name}.jsonl", map(to_row, getattr(self, name)))

    def lengths(self, tokenizer: Any, template: str) -> dict[str, int]:
        """Limits in tokens, multiples of 16, that cut or drop at most one row in a hundred."""
        encoder = Encoder(tokenizer, template, max_request_tokens=10**6, max_response_tokens=10**6)
        encoded = [encoder.encode(0, example) for example in self.train]
        requests = [len(item.request_ids) for item in encoded]
        found = {"max_request_tokens": _limit(requests)}
        if self.has_references:
            found["max_response_tokens"] = _limit([len(e.response_ids or ()) for e in encoded])
        return found


def read_rows(data: Any, held_out: Any, columns: Any) -> Rows:
    """Read the user's data and split it.

    Raises:
        UserError: for data that can't be read or is too little, and for a held-out file of which
            nothing is new.
    """
    rows, notes = read_examples(data, columns), []
    if held_out is None:
        train, test = split_by_digest(rows, HELD_OUT if len(rows) >= 100 else len(rows) // 10 or 1)
        notes.append(
            f"no held-out data given: {len(test)} of {len(rows)} rows are held out, by the digest "
            "of the request"
        )
    else:
        test = read_examples(held_out, columns)
        train = _without(rows, test)
        if len(train) < len(rows):
            notes.append(f"{len(rows) - len(train)} rows are in the held-out data: not trained on")
    if len(train) < 2:
        raise UserError(
            f"{len(train)} rows are left to learn from. Bring more requests, or hold out fewer."
        )
    train, validation = split_by_digest(train, min(NUM_VALIDATION, len(train) // 10 or 1))
    shared = overlap(train, test)
    if shared.near:
        notes.append(f"{len(shared.near)} held-out requests are nearly equal to a training request")
    return Rows(train=train, validation=validation, held_out=test, notes=tuple(notes))


def to_row(example: Example) -> dict[str, Any]:
    """The example as a line of JSON that is read back as the same example."""
    row: dict[str, Any] = {"instruction": example.instruction, "input": example.input}
    name = "output"
    if example.messages:
        row, name = {"messages": list(example.messages), "tools": list(example.tools)}, "response"
    if example.responses:
        row[name] = list(example.responses)
    return row


def _without(rows: list[Example], others: list[Example]) -> list[Example]:
    """The rows whose request is in none of the others, white space aside."""
    known = set(overlap(others, rows).exact)
    return [row for place, row in enumerate(rows) if place not in known]


def _limit(lengths: list[int]) -> int:
    longest = sorted(lengths)[int(LONG * (len(lengths) - 1))]
    return -(-longest // 16) * 16
