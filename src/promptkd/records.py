"""What verbs return: what their files hold, with attributes, and printed as commands print it."""

from collections.abc import Iterator
from typing import Any

WIDEST = 100
"""Characters of a value in the general form."""


class Record(dict[str, Any]):
    """A JSON object whose keys are attributes too, at every depth.

    >>> found = Record(data="test.jsonl", scores={"rouge_l": {"mean": 21.3}})
    >>> found.scores.rouge_l.mean
    21.3
    >>> found
    data: test.jsonl
    scores: {'rouge_l': {'mean': 21.3}}
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"there is no '{name}'; there are: {', '.join(map(str, self))}")
        value = self[name]
        return Record(value) if type(value) is dict else value

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def lines(self) -> Iterator[str]:
        """What is shown of it."""
        for key, value in self.items():
            text = str(value)
            yield f"{key}: {text if len(text) <= WIDEST else f'{text[:WIDEST]} ...'}"

    def __repr__(self) -> str:
        return "\n".join(self.lines())
