"""Which token ids two models share."""

from dataclasses import replace
from typing import Any

import torch

from promptkd.errors import UserError
from promptkd.models.frozen import WHOLE, Storage
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import embedding_rows, load_language_model, load_tokenizer


def first_difference(
    student: dict[str, int], teacher: dict[str, int]
) -> tuple[int, str, str] | None:
    """The lowest id whose token differs between two token tables, with both tokens."""
    by_id = {i: token for token, i in student.items()}
    by_id_teacher = {i: token for token, i in teacher.items()}
    for i in range(max(*by_id, *by_id_teacher) + 1):
        if by_id.get(i) != by_id_teacher.get(i):
            return i, by_id.get(i, "(none)"), by_id_teacher.get(i, "(none)")
    return None


def shared_vocabulary(
    student_tokenizer: Any, teacher_tokenizer: Any, student: Any, teacher: Any
) -> int:
    """How many token ids are compared: the rows both models have, if the token tables are equal.

    Raises:
        UserError: if the tables differ, naming the first id that does.
    """
    difference = first_difference(_table(student_tokenizer), _table(teacher_tokenizer))
    if difference:
        i, own, other = difference
        raise UserError(
            f"Student and teacher have different tokenizers: token {i} is {own!r} for the student "
            f"and {other!r} for the teacher. Token-level methods compare them entry by entry. Use "
            "a teacher with the student's tokenizer, or the method 'seqkd', which needs only text.",
            "PK203",
        )
    rows = min(embedding_rows(module) for module in (student, teacher))
    tokens = max(_table(student_tokenizer).values()) + 1
    if rows < tokens:
        raise UserError(
            f"The tokenizer has {tokens} tokens, but one of the models has only {rows} embedding "
            "rows. The tokenizer doesn't belong to that model."
        )
    return rows


def same_tokenizer(student_tokenizer: Any, teacher_tokenizer: Any) -> bool:
    return first_difference(_table(student_tokenizer), _table(teacher_tokenizer)) is None


def _table(tokenizer: Any) -> dict[str, int]:
    """Tokens by id, without a padding token added at the end: no response ever holds it."""
    table = dict(tokenizer.get_vocab())
    pad, last = tokenizer.pad_token_id, max(table.values())
    if pad == last and tokenizer.pad_token != tokenizer.eos_token:
        del table[tokenizer.pad_token]
    return table


def same_weights(one: Any, other: Any) -> bool:
    """Whether two models are one: all of their weights are equal."""
    ours, theirs = one.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        return False
    return all(
        value.shape == theirs[name].shape and torch.equal(value, theirs[name].to(value))
        for name, value in ours.items()
    )


def load_pair(
    student: str,
    teacher: str | None,
    tokenizer: Any,
    precision: str,
    storage: Storage = WHOLE,
) -> tuple[LanguageModel, LanguageModel | None]:
    """Two models over their shared vocabulary, or the first alone over all of its own.

    Args:
        student: the first model's name.
        teacher: the second's.
        tokenizer: the student's.
        precision: auto | bf16 | fp32.
        storage: how the teacher's weights are held.

    Raises:
        UserError: if one can't be loaded, or they have different token tables.
    """
    own = load_language_model(student, precision)
    if teacher is None:
        return own, None
    other = load_language_model(teacher, precision, storage=storage)
    shared = shared_vocabulary(tokenizer, load_tokenizer(teacher), own.module, other.module)
    return replace(own, vocabulary=shared), replace(other, vocabulary=shared)
