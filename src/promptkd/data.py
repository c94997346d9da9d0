"""Reading what users bring, and handing out the requests of one optimizer step at a time.

At the border: JSONL, JSON, CSV, Parquet or a hub data set, with ``instruction``/``input``/
``output``, ``prompt``/``completion``, ``messages`` or ``request``/``response`` columns. Inside
there are only requests and responses. No torch here: token ids are lists of integers.
"""

import csv
import glob
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from promptkd.config import Recipe
from promptkd.errors import UserError

ALPACA = (
    "Below is an instruction that describes a task"
    "{% if input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n"
    "{% if input %}### Input:\n{{ input }}\n\n{% endif %}### Response:\n"
)
VERBATIM = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
COLUMNS = "instruction (input, output), prompt (completion), messages, or request (response)"


@dataclass(frozen=True)
class Example:
    """One row: what is asked, and the reference responses (none, one or several)."""

    instruction: str
    input: str = ""
    responses: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    """The turns before the response, when the row came as a conversation."""


@dataclass(frozen=True)
class EncodedExample:
    """An example as the student reads it. ``response_ids`` ends with EOS unless it was cut."""

    index: int
    request_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    references: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """This rank's share of the requests of one optimizer step."""

    examples: tuple[EncodedExample, ...]


def read_examples(sources: Iterable[str]) -> list[Example]:
    """Read every row of every source, in order.

    Args:
        sources: paths, globs, or hub ids (``owner/name`` or ``owner/name:split``).

    Raises:
        UserError: for a missing or empty file or a broken row, with file and line number.
    """
    examples = []
    for source in sources:
        for path in _expand(source):
            try:
                rows = list(_rows(path))
            except (ValueError, csv.Error) as error:
                raise UserError(f"{path} can't be read: {error}. Mend or convert it.") from None
            if not rows:
                raise UserError(f"{path} holds no rows. Give a file with at least one request.")
            examples.extend(_example(row, where) for where, row in rows)
    return examples


class Encoder:
    """Turns examples into token ids: one template, one tokenizer, one place where text is cut."""

    def __init__(
        self, tokenizer: Any, template: str, max_request_tokens: int, max_response_tokens: int
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.max_request_tokens = max_request_tokens
        self.max_response_tokens = max_response_tokens
        self.eos_token_id = tokenizer.eos_token_id
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "data.template is 'chat', but this tokenizer has no chat template. "
                "Use 'alpaca', 'none' or a template file."
            )

    @classmethod
    def of_recipe(cls, recipe: Recipe, tokenizer: Any) -> "Encoder":
        """The recipe's template and limits, with the tokenizer of any of its models."""
        d = recipe.data
        return cls(tokenizer, d.template, d.max_request_tokens, d.max_response_tokens)

    def render(self, example: Example) -> str:
        """The request's text, up to where the response begins."""
        if self.template == "chat":
            alone = {"role": "user", "content": _render(template_of("none"), example)}
            return self.tokenizer.apply_chat_template(
                list(example.messages) or [alone], tokenize=False, add_generation_prompt=True
            )
        try:
            return _render(template_of(self.template), _as_single_turn(example))
        except jinja2.TemplateError as error:
            raise UserError(f"data.template {self.template} fails: {error}.") from None

    def request_ids(self, example: Example) -> tuple[int, ...]:
        """The request as tokens, with the tokenizer's own start token if it has one.

        The same for training and evaluation; the authors' code adds the start token in
        evaluation only.
        """
        text = self.render(example)
        special = self.template != "chat"  # a chat template writes its special tokens itself
        ids = self.tokenizer(text, add_special_tokens=special).input_ids
        if ids and ids[-1] == self.eos_token_id and special:
            ids = ids[:-1]  # some tokenizers end every text; a request goes on
        return tuple(ids)

    def response_ids(self, text: str) -> tuple[int, ...]:
        """A response as tokens, ending with EOS unless it had to be cut."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return tuple([*ids, self.eos_token_id][: self.max_response_tokens])

    def encode(self, index: int, example: Example) -> EncodedExample:
        response = self.response_ids(example.responses[0]) if example.responses else None
        return EncodedExample(index, self.request_ids(example), response, example.responses)

    def fits(self, example: Example) -> bool:
        return len(self.request_ids(example)) <= self.max_request_tokens

    def cut_to_fit(self, example: Example) -> Example:
        """Shorten the input, and where that isn't enough the instruction, until the request fits.

        The template stays whole; the authors' code cuts the end of the rendered text and so
        loses the '### Response:' line of the longest requests.

        Raises:
            UserError: if the template alone is too long.
        """
        part, text, without_input = "input", example.input, _replace(example, "input", "")
        if not text or not self.fits(without_input):
            part, text, example = "instruction", example.instruction, without_input
        shortest, longest = 0, len(text)
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            fits = self.fits(_replace(example, part, text[:middle]))
            shortest, longest = (middle, longest) if fits else (shortest, middle - 1)
        cut = _replace(example, part, text[:shortest])
        if not self.fits(cut):
            needed, limit = len(self.request_ids(cut)), self.max_request_tokens
            raise UserError(
                f"max_request_tokens = {limit}, but the template alone has {needed}. Raise it."
            )
        return cut


@dataclass(frozen=True)
class Dataset:
    """Encoded examples and what had to be cut or dropped on the way."""

    examples: tuple[EncodedExample, ...]
    num_dropped_requests: int = 0
    num_cut_requests: int = 0
    num_cut_responses: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def has_references(self) -> bool:
        return all(example.response_ids is not None for example in self.examples)

    def summary(self) -> str:
        return (
            f"{len(self.examples)} requests ({self.num_dropped_requests} too long, dropped; "
            f"{self.num_cut_requests} cut to fit; {self.num_cut_responses} references cut)"
        )


def training_set(examples: Sequence[Example], encoder: Encoder) -> Dataset:
    """Encode for training: requests over the limit are dropped and counted, as the authors do.

    Raises:
        UserError: if no request is left.
    """
    encoded = [encoder.encode(index, example) for index, example in enumerate(examples)]
    kept = tuple(e for e in encoded if len(e.request_ids) <= encoder.max_request_tokens)
    if not kept:
        raise UserError(
            f"All {len(encoded)} requests are longer than max_request_tokens = "
            f"{encoder.max_request_tokens}. Raise it, or bring shorter requests."
        )
    return Dataset(kept, len(encoded) - len(kept), 0, _num_cut_responses(kept, encoder))


def evaluation_set(examples: Sequence[Example], encoder: Encoder) -> Dataset:
    """Encode for evaluation: every request is kept, those over the limit are cut and counted."""
    encoded, num_cut = [], 0
    for index, example in enumerate(examples):
        item = encoder.encode(index, example)
        if len(item.request_ids) > encoder.max_request_tokens:
            item = encoder.encode(index, encoder.cut_to_fit(example))
            num_cut += 1
        encoded.append(item)
    return Dataset(tuple(encoded), 0, num_cut, _num_cut_responses(encoded, encoder))


def batch_of_step(
    data: Dataset, step: int, global_batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1
) -> Batch:
    """The rank's share of the requests of ``step`` (counted from 0).

    A pure function of its arguments, so that a resumed run sees what the uninterrupted one saw:
    epochs are permutations seeded by (seed, epoch), read one after the other.
    """
    start = step * global_batch_size
    positions = range(start, start + global_batch_size)
    indices = [_permutation(len(data), seed, p // len(data))[p % len(data)] for p in positions]
    return Batch(tuple(data.examples[i] for i in indices[rank::num_ranks]))


def steps_of_epochs(epochs: float, num_examples: int, global_batch_size: int) -> int:
    return max(1, math.ceil(epochs * num_examples / global_batch_size))


@cache
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"data order {seed} {epoch}").shuffle(order)
    return tuple(order)


def _num_cut_responses(examples: Iterable[EncodedExample], encoder: Encoder) -> int:
    return sum(
        example.response_ids is not None and example.response_ids[-1] != encoder.eos_token_id
        for example in examples
    )


@cache
def template_of(name: str) -> jinja2.Template:
    """The template of a name: ``alpaca``, ``none``, or a Jinja file.

    Raises:
        UserError: if it is none of these.
    """
    text = {"alpaca": ALPACA, "none": VERBATIM}.get(name)
    if text is None:
        if not Path(name).is_file():
            raise UserError(
                f"data.template '{name}' is neither alpaca, chat, none nor an existing Jinja file."
            )
        text = Path(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(text)


def _render(template: jinja2.Template, example: Example) -> str:
    return template.render(instruction=example.instruction, input=example.input)


def _as_single_turn(example: Example) -> Example:
    if not example.messages:
        return example
    roles = [turn["role"] for turn in example.messages]
    if roles != ["user"]:
        raise UserError(
            f"A conversation with the turns {roles} "
            "needs data.template: chat; the other templates hold a single user turn."
        )
    return Example(example.messages[0]["content"], "", example.responses)


def _replace(example: Example, part: str, text: str) -> Example:
    turns = example.messages
    if part == "instruction" and turns:
        turns = (*turns[:-1], {**turns[-1], "content": text})
    return replace(example, messages=turns, **{part: text})


def _expand(source: str) -> list[str]:
    if glob.has_magic(source):
        paths = sorted(glob.glob(source))
        if not paths:
            raise UserError(f"No file matches {source}.")
        return paths
    return [source]


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) pairs; where is ``file:line`` for text files, ``file:row`` otherwise."""
    suffix = Path(path).suffix.lower()
    if Path(path).is_file():
        if suffix in {".jsonl", ".json"}:
            yield from _json_rows(path)
        elif suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, restkey="(more)")
                for row in reader:
                    yield f"{path}:{reader.line_num}", dict(row)
        elif suffix == ".parquet":
            import pyarrow.parquet

            for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
                yield f"{path}:{number}", row
        else:
            raise UserError(f"{path}: the format '{suffix}' is unknown. Use JSONL, CSV or Parquet.")
        return
    if suffix or Path(path).is_absolute() or path.count("/") != 1:
        raise UserError(f"{path} does not exist. Give a file, a glob, or a hub id (owner/name).")
    yield from _hub_rows(path)


def _json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at column {error.colno}"
                raise UserError(f"{path}:{number}: broken JSON ({reason}). Mend it.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object. Each line is one object.")
            yield f"{path}:{number}", row


def _hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{source} is neither a file nor a data set that the hub gives ({error}). "
            "Give a path, a glob, or a hub id (owner/name or owner/name:split)."
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", dict(row)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _example(row: dict[str, Any], where: str) -> Example:
    if row.get("messages"):
        return _conversation(row["messages"], where)
    pairs = (("instruction", "output"), ("prompt", "completion"), ("request", "response"))
    for request, response in pairs:
        if request not in row:
            continue
        if isinstance(row[request], list):
            return _conversation(row[request] + list(row.get(response) or []), where)
        text = row[request]
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: '{request}' is {text!r}, not a text. Each row asks for one.")
        context = row.get("input") or ""
        if not isinstance(context, str):
            raise UserError(f"{where}: 'input' is {context!r}, not a text.")
        return Example(text, context, _responses(row.get(response), where))
    raise UserError(f"{where}: no request found in the columns {sorted(row)}. Known: {COLUMNS}.")


def _responses(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "" or value == []:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise UserError(f"{where}: the response is {value!r}, neither a text nor a list of texts.")
    return tuple(values)


def _conversation(turns: Any, where: str) -> Example:
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))
        for turn in turns
    ):
        raise UserError(f"{where}: messages must be a list of {{role, content}} objects.")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    answered = turns[-1]["role"] == "assistant"
    before, responses = (turns[:-1], (turns[-1]["content"],)) if answered else (turns, ())
    if not before or before[-1]["role"] != "user":
        raise UserError(f"{where}: the conversation has no user turn to respond to.")
    return Example(before[-1]["content"], "", responses, before)
