"""Models and rows that came as objects of Python, under names that records can keep. No torch.

Everything here is loaded by name, and what a run learns from is written down by name. An object
goes the same way: its name says what it was, and carries it. Whoever loads takes the object;
whoever writes has a text.
"""

from typing import Any

from promptkd.errors import UserError

PREFIX = "object:"


class Given(str):
    """The name of an object, with the object; without it, as in a file, it leads to nothing."""

    thing: Any

    def __new__(cls, what: str, thing: Any) -> Any:
        own = super().__new__(cls, PREFIX + what)
        own.thing = thing
        return own

    def __reduce__(self) -> Any:
        return str, (str(self),)  # a copy, which is for a record, is the name alone


class GivenModel(Given):
    """A causal language model with its tokenizer; see ``models.objects``."""

    tokenizer: Any


class GivenRows(Given):
    """Rows, and what they are ``called`` in sentences: "row 3 of train"."""

    called: str


def of_object(name: str) -> tuple[str, str]:
    """What an object was, and where it came from; for other names nothing, and the name.

    >>> of_object("object:LlamaForCausalLM of models/teacher")
    ('LlamaForCausalLM', 'models/teacher')
    >>> of_object("models/teacher")
    ('', 'models/teacher')
    """
    if not name.startswith(PREFIX):
        return "", name
    what, _, place = name.removeprefix(PREFIX).partition(" of ")
    return what, place


def is_lost(name: str) -> bool:
    """Whether the name is an object's, which isn't there any more."""
    return name.startswith(PREFIX) and not isinstance(name, Given)


def refuse_lost(name: str) -> None:
    """Refuse the name of an object without the object.

    Raises:
        UserError: saying what to give again.
    """
    if is_lost(name):
        raise UserError(
            f"'{name}' came as an object of Python, which no file brings back. Give it again: "
            "pk.train('recipe.yaml', student=..., teacher=..., train=...) goes on, and returns a "
            "run that has its objects. Or save it and name its place."
        )


def same(one: str, other: str) -> bool:
    """Whether two names stand for one thing; objects of one kind may be called alike."""
    if isinstance(one, Given) and isinstance(other, Given):
        return one.thing is other.thing
    return one == other
