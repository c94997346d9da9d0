"""A real HTTP server on this machine that answers like a chat model, or badly, as a test says."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from promptkd.judge.judge import judge


@dataclass(frozen=True)
class Asked:
    """One request as it arrived; ``number`` counts from 0."""

    number: int
    seconds: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def text(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Answer:
    """A status and a body; ``status`` None hangs up, ``delay`` is in seconds."""

    status: int | None = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


def says(text: str | None, delay: float = 0.0) -> Answer:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = json.dumps({"id": "1", "object": "chat.completion", "model": "m", "choices": choices})
    return Answer(body=body, delay=delay)


def shown_grades(asked: Asked) -> tuple[int, int]:
    """The numbers of "worth N" in the first and in the second reply shown."""
    first, second = re.findall(r"worth (\d+)", asked.text)
    return int(first), int(second)


def fair_grades(asked: Asked) -> Answer:
    """Grades every reply with what it says it is worth."""
    first, second = shown_grades(asked)
    return says(f"{first} {second}\nAs they say.")


def fair_preference(asked: Asked) -> Answer:
    """Prefers the reply that says it is worth more, wherever it is shown."""
    first, second = shown_grades(asked)
    return says("tie" if first == second else "first" if first > second else "second")


class JudgeServer:
    """``with JudgeServer(answer) as server``: ``server.base_url``, ``server.asked``.

    ``answer`` may be replaced while it runs. The port stays the server's own after ``stop``.
    """

    def __init__(self, answer: Callable[[Asked], Answer]):
        self.answer = answer
        self.asked: list[Asked] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with owner._lock:
                    asked = Asked(
                        len(owner.asked),
                        time.monotonic(),
                        self.path,
                        {name.lower(): value for name, value in self.headers.items()},
                        json.loads(body),
                    )
                    owner.asked.append(asked)
                answer = owner.answer(asked)
                owner._stopping.wait(answer.delay)
                self.close_connection = True
                if answer.status is None:
                    return
                encoded = answer.body.encode()
                headers = {"Content-Type": "application/json", "Connection": "close"}
                self.send_response(answer.status)
                for name, value in (headers | answer.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = False  # so that closing waits for answers under way

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed or gave up waiting

        self._stopping = threading.Event()
        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._thread.is_alive():
            self._stopping.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def write_predictions(run: Path, worth: dict[int, list[int]], reference: list[int]) -> Path:
    """Predictions by seed that say what they are worth, with references that do too."""
    rows = [
        {
            "index": index,
            "seed": seed,
            "request": f"request {index}",
            "response": f"worth {value}",
            "references": [f"worth {reference[index]}"],
            "num_tokens": 2,
            "ended": True,
        }
        for seed, values in worth.items()
        for index, value in enumerate(values)
    ]
    (run / "evaluation").mkdir(parents=True)
    path = run / "evaluation" / "test.predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def ask(run: Path, server: JudgeServer, **options: Any) -> dict[str, Any]:
    """Judge the predictions of ``write_predictions``."""
    defaults = {"model": "grader", "max_retries": 1}
    return judge(run, "test.jsonl", base_url=server.base_url, **(defaults | options))
