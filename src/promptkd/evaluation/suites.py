"""Suites: several named data sets that one evaluation scores one by one. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.given import GivenRows
from promptkd.keys import read_keys

PAPER_SEEDS = (10, 20, 30, 40, 50)
"""Decoding seeds of PromptKD's and MiniLLM's tables."""


def distinct(seeds: Sequence[int]) -> tuple[int, ...]:
    """Decoding seeds: each stands for one response per request.

    Raises:
        UserError: if there is none, or one stands there twice, which would count its responses so.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"The seeds are {list(seeds)}: give at least one, and each once.")
    return tuple(seeds)


def read_suite(path: str | Path) -> dict[str, list[str]]:
    """A suite of data sets: YAML that maps names to a path, glob or hub id, or a list of them.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    return suite_of_mapping(read_keys(path, "Suite"), f"Suite {path}")


def suite_of_mapping(raw: Any, what: str) -> dict[str, list[str]]:
    """Names with their data; ``what`` holds them stands in complaints.

    Raises:
        UserError: if it is anything else.
    """
    form = "A suite maps names to data, as in 'dolly: data/dolly_test.jsonl'."
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{what} holds no data sets. {form}")
    for name, sources in raw.items():
        if not sources or not all(isinstance(own, str) and own for own in listed(sources)):
            raise UserError(f"{what}: '{name}' is {sources!r}, which is no data. {form}")
        if "/" in str(name) or not str(name).isprintable():
            raise UserError(
                f"{what}: {str(name)!r} names files of scores. Leave out slashes and what can't be "
                "printed."
            )
    return {str(name): listed(sources) for name, sources in raw.items()}


def suite_of_files(sources: Sequence[str]) -> dict[str, list[str]]:
    """Every source a data set of its own, named after its file.

    Raises:
        UserError: if two have the same name, so that one's scores would replace the other's.
    """
    suite: dict[str, list[str]] = {}
    for source in sources:
        name = name_of(source)
        if name in suite:
            raise UserError(
                f"{suite[name][0]} and {source} would both be scored as '{name}'. Give them names "
                "in a suite file (--suite), or evaluate them into different outputs."
            )
        suite[name] = [source]
    return suite


def listed(sources: Any) -> list[Any]:
    return list(sources) if isinstance(sources, list | tuple) else [sources]


def name_of(sources: str | Sequence[str]) -> str:
    first = listed(sources)[0]
    return first.called if isinstance(first, GivenRows) else Path(first.replace("*", "all")).stem
