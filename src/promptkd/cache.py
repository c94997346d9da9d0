"""Teacher responses kept on disk by content, for every run that asks for them again."""

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn


def cache_directory() -> Path:
    """``PROMPTKD_CACHE``, or ``~/.cache/promptkd``."""
    return Path(os.environ.get("PROMPTKD_CACHE", Path.home() / ".cache" / "promptkd"))


def fingerprint(module: nn.Module) -> str:
    """A hash of a model's weights: names, shapes, and a sample of every tensor's numbers."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 512)]
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class ResponseCache:
    """Texts by (author, request, decoding, seed); several processes may use it at once."""

    def __init__(self, author: str):
        self.author = author
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(directory / "responses.sqlite", timeout=60)
        with self._database:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, text TEXT, ended INT)"
            )

    def key(self, request_ids: Sequence[int], decoding: dict[str, Any], seed: int) -> str:
        content = json.dumps([self.author, list(request_ids), decoding, seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def __contains__(self, key: str) -> bool:
        row = self._database.execute("SELECT 1 FROM responses WHERE key = ?", (key,)).fetchone()
        return row is not None

    def get(self, key: str) -> tuple[str, bool]:
        """The text, and whether its author ended it."""
        row = self._database.execute(
            "SELECT text, ended FROM responses WHERE key = ?", (key,)
        ).fetchone()
        return row[0], bool(row[1])

    def put(self, key: str, text: str, ended: bool) -> None:
        with self._database:
            self._database.execute(
                "INSERT OR REPLACE INTO responses VALUES (?, ?, ?)", (key, text, int(ended))
            )
