"""Teacher responses kept on disk by content, for every run that asks for them again."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from promptkd.errors import UserError
from promptkd.models.settings import chosen


def cache_directory() -> Path:
    """``PROMPTKD_CACHE``, or ``~/.cache/promptkd``."""
    return Path(os.environ.get("PROMPTKD_CACHE") or Path.home() / ".cache" / "promptkd")


def fingerprint(module: nn.Module) -> str:
    """A hash of a model's weights: names, shapes, and every number of every tensor.

    What a checkpoint holds beside parameters (a router's correction) counts as well.
    """
    digest = hashlib.sha256()
    for name, weight in [*sorted(module.named_parameters()), *sorted(_saved_buffers(module))]:
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        content = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for place, part in module.named_modules():
        for name, buffer in part.named_buffers(place, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def author_of(module: nn.Module, dtype: torch.dtype, stop: Sequence[int]) -> str:
    """Who writes: weights, the configuration that says how they are used, precision, ends."""
    config: Any = module.config
    how = _digest(json.dumps(chosen(config), sort_keys=True))
    return f"{fingerprint(module)} {how} {dtype} {list(stop)}"


class ResponseCache:
    """Token ids by (author, request, decoding, seed); several processes may use it at once.

    SQLite doesn't see a wrong byte in a row, so each carries a digest of its ids.

    Raises:
        UserError: from every method, if the file is damaged or the disk is full.
    """

    def __init__(self, author: str):
        self.author = author
        try:
            directory = cache_directory()
            directory.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # the latter where there is no home
            raise UserError(
                f"The teacher's responses can't be kept ({error}). Set PROMPTKD_CACHE to a "
                "directory that can be written to."
            ) from None
        self._path = directory / "responses.sqlite"
        if self._path.is_dir():
            raise UserError(f"The response cache {self._path} is a directory. Remove it.")
        try:
            self._database = sqlite3.connect(self._path, timeout=60)
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        self._execute(
            "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, ids TEXT, digest TEXT)"
        )

    def key(self, request_ids: Sequence[int], decoding: dict[str, Any], seed: int) -> str:
        content = [self.author, list(request_ids), decoding, seed]
        return _digest(json.dumps(content, sort_keys=True))

    def __contains__(self, key: str) -> bool:
        return bool(self._execute("SELECT 1 FROM responses WHERE key = ?", key))

    def get(self, key: str) -> tuple[int, ...]:
        """A response, its stop token included if its author ended it."""
        ((ids, digest),) = self._execute("SELECT ids, digest FROM responses WHERE key = ?", key)
        if digest != _digest(f"{key} {ids}"):
            raise self._unusable("a response is not as it was written")
        return tuple(json.loads(ids))

    def put(self, key: str, token_ids: Sequence[int]) -> None:
        ids = json.dumps(list(token_ids))
        row = key, ids, _digest(f"{key} {ids}")
        self._execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", *row)

    def _execute(self, statement: str, *values: str | int) -> list[Any]:
        try:
            with self._database:
                return self._database.execute(statement, values).fetchall()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._unusable(error) from None

    def _unusable(self, reason: object) -> UserError:
        return UserError(
            f"The response cache {self._path}: {reason}. Free some space if the disk is full, "
            "set PROMPTKD_CACHE to another directory, or remove the file; its responses are then "
            "written again."
        )


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
