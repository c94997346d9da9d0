"""The exceptions a user can cause, and the system's own errors in the same form. No torch."""

import errno


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
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENOMEM: "Free some memory, or use smaller models or batches.",
    errno.ECONNREFUSED: "Start the server, or name another one.",
} | dict.fromkeys(NO_SPACE, "Free some space and run the same command again.")
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
    if not isinstance(error, OSError):
        return None
    if error.errno is None or error.strerror is None:  # a library's own, with its own words
        return " ".join(str(error).split())
    place = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno, "Name another place.")
    return f"{place}{error.strerror}. {remedy}"
