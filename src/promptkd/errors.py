"""The exceptions a user can cause, and the system's own errors in the same form. No torch."""

import errno
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend: value, reason, remedy. Commands print it and exit with 1.

    Attributes:
        code: of the finding in docs/findings.md, if it is one.
    """

    def __init__(self, sentence: str, code: str = ""):
        super().__init__(f"{sentence} ({code})" if code else sentence)
        self.code = code


class NotFinite(UserError):
    """A loss, a gradient or what a model says is NaN or infinite."""


class Stopped(Exception):
    """Somebody asked for an end; commands print its sentence and exit with ``status``.

    Attributes:
        status: 128 + the signal's number, as shells count.
    """

    def __init__(self, sentence: str, signal_number: int):
        super().__init__(sentence)
        self.status = 128 + signal_number


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REMEDIES = {
    errno.EACCES: "Make it accessible, or name another place.",
    errno.EPERM: "Make it accessible, or name another place.",
    errno.EROFS: "Name a place that can be written to.",
    errno.ENOENT: "Name one that exists.",
    errno.ENAMETOOLONG: "Name a shorter one.",
    errno.EISDIR: "Move what stands there, or name another place.",
    errno.EEXIST: "Move what stands there, or name another place.",
    errno.ENOTDIR: "Move what stands there, or name another place.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENOMEM: "Free some memory, or use smaller models or batches.",
    errno.ECONNREFUSED: "Start the server, or name another one.",
} | dict.fromkeys(NO_SPACE, "Free some space and run the same command again.")
WORDS_FOR_NO_SPACE = ("No space left", "Disk quota", "File too large", "PytorchStreamWriter")
"""How torch and safetensors hand on what the system said, in errors of their own."""
WORDS_FOR_NO_MEMORY = ("OutOfMemoryError", "MemoryError", "can't allocate memory")


def sentence_of(error: BaseException) -> str | None:
    """What the user can do about an error of the system; None if it is no such error.

    >>> sentence_of(FileNotFoundError(2, "No such file or directory", "train.jsonl"))
    'train.jsonl: No such file or directory. Name one that exists.'
    """
    if any(word in f"{type(error).__name__}: {error}" for word in WORDS_FOR_NO_MEMORY):
        return (
            "The memory is used up. Use a smaller optimization.micro_batch_tokens, "
            "gradient_checkpointing, or smaller models."
        )
    if not isinstance(error, OSError):  # torch hides the system's own
        full = "No space left on a disk. Free some space and run the same command again."
        return full if out_of_space(error) else None
    if error.errno is None or error.strerror is None:  # a library's own, with its own words
        return " ".join(str(error).split())
    place = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno, "Name another place.")
    return f"{place}{error.strerror}. {remedy}"


def out_of_space(error: BaseException) -> bool:
    """Whether the disk was full, whichever error it came as: torch's hides the system's own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_SPACE:
            return True
        if any(word in str(seen) for word in WORDS_FOR_NO_SPACE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def in_a_sentence(verb: Callable[P, T]) -> Callable[P, T]:
    """The same function, in which an error of the system is a ``UserError`` with its remedy."""

    @functools.wraps(verb)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return verb(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            raise UserError(sentence) from error

    return told
