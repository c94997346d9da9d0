"""The client of an OpenAI-compatible server, and the cache of its replies on disk."""

import hashlib
import json
import os
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from promptkd.errors import UserError

HOPELESS = {401, 403, 404}
"""Statuses that no other question would change: the key, the permission, the address or model."""


class RequestFailed(Exception):
    """A question without a reply, after all retries; ``hopeless`` if others would fail alike."""

    def __init__(self, reason: str, hopeless: bool = False):
        super().__init__(reason)
        self.hopeless = hopeless


@dataclass(frozen=True)
class JudgeSettings:
    """Which model judges, and how it is asked.

    Attributes:
        base_url: of an OpenAI-compatible endpoint, up to and with ``/v1``.
        model: the judge's name there.
        protocol: "score" or "pairwise".
        max_reasks: how often a malformed reply is asked for again, with another judge seed.
        max_concurrency: questions at a time.
        timeout: seconds for one answer.
        max_retries: per question, after a timeout, a lost connection or status 408, 409, 429, 5xx.
        api_key_variable: environment variable with the key; none is sent if it isn't set.
    """

    base_url: str
    model: str
    protocol: str = "score"
    temperature: float = 0.7  # the paper's judge, Table 6
    max_reply_tokens: int = 1024
    max_reasks: int = 2
    max_concurrency: int = 4
    timeout: float = 60.0
    max_retries: int = 4
    api_key_variable: str = "OPENAI_API_KEY"

    @property
    def host(self) -> str:
        return host_of(self.base_url)


class Endpoint:
    """A model behind ``base_url``/chat/completions; retries with growing, jittered waits.

    Raises:
        UserError: if the address or key can't be used.
    """

    def __init__(self, settings: JudgeSettings):
        import openai  # takes half a second, which a mistyped command shouldn't

        self.settings = settings
        self.host = settings.host
        self._key = os.environ.get(settings.api_key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(
                f"The environment variable {settings.api_key_variable} holds characters that no "
                "API key has. Set it to the key alone."
            )
        # With no key of its own choice the client would take OPENAI_API_KEY for any host.
        self.client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )

    def key(self, text: str, seed: int) -> str:
        """What a reply depends on, wherever the model is served."""
        own = self.settings
        content = json.dumps([own.model, text, own.temperature, own.max_reply_tokens, seed])
        return hashlib.sha256(content.encode()).hexdigest()

    def ask(self, text: str, seed: int) -> str:
        """The model's reply.

        Raises:
            RequestFailed: if there is none after all retries.
        """
        import openai

        completions = self.client.chat.completions
        try:
            response = completions.with_raw_response.create(
                model=self.settings.model,
                messages=[{"role": "user", "content": text}],
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_reply_tokens,
                seed=seed,
                extra_headers={} if self._key else {"Authorization": openai.Omit()},
            )
        except openai.APITimeoutError:
            raise RequestFailed(f"no answer within {self.settings.timeout:g} seconds") from None
        except openai.APIConnectionError as error:
            raise RequestFailed(f"no connection ({type(error.__cause__).__name__})") from None
        except openai.APIStatusError as error:
            hopeless = error.status_code in HOPELESS
            body = self._without_key(error.response.text)
            raise RequestFailed(f"status {error.status_code} {shortened(body)}", hopeless) from None
        try:
            reply = json.loads(response.text)["choices"][0]["message"]["content"] or ""
            whole = reply.encode("utf-8", "replace").decode()  # a cut emoji is half a character
            return self._without_key(whole)
        except (ValueError, LookupError, TypeError, AttributeError):
            body = self._without_key(response.text)
            raise RequestFailed(f"status 200, but no chat completion: {shortened(body)}") from None

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


class KeptReplies:
    """The judge's replies on disk by (model, question, decoding), each safe once it arrived."""

    def __init__(self, path: Path):
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, timeout=60, check_same_thread=False)
        with self._database:
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)"
            )

    def get(self, key: str) -> str | None:
        with self._lock:
            query = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,))
            row = query.fetchone()
        return row[0] if row else None

    def put(self, key: str, reply: str) -> None:
        with self._lock, self._database:
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    def close(self) -> None:
        """Between two replies: a thread that was left behind may be writing one."""
        with self._lock:
            self._database.close()


def shortened(text: str, limit: int = 200) -> str:
    """The beginning of a text as one line."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def host_of(base_url: str) -> str:
    """Host and port, without what else an address may hold (a user's name, a password).

    Raises:
        UserError: if it is no http address.
    """
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets or a port that are none
        parts, valid = urlsplit(""), False
    if not valid:
        raise UserError(
            f"The judge's address is '{base_url.rpartition('@')[2]}', not an http address. "
            "Give the server's, up to /v1: http://127.0.0.1:8000/v1."
        )
    return parts.netloc.rpartition("@")[2]
