"""The judge when its server is slow, wrong or gone, and where its key goes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from judge_server import (
    Answer,
    Asked,
    JudgeServer,
    ask,
    fair_grades,
    says,
    write_predictions,
)
from promptkd.errors import UserError
from promptkd.judge.judge import MAX_FAILURES_IN_A_ROW, judge

KEY = "sk-secret-7Q2x"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def texts_of(directory: Path) -> str:
    return "".join(p.read_bytes().decode(errors="replace") for p in directory.rglob("*.*"))


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(tmp_path):
    run = write_predictions(tmp_path, {10: [2]}, [5])

    def answer(asked: Asked) -> Answer:
        if asked.number == 0:
            return Answer(429, '{"error": {"message": "slow down"}}', {"Retry-After": "1.2"})
        return fair_grades(asked)

    with JudgeServer(answer) as server:
        result = ask(run, server)
    first, second = server.asked
    assert 1.2 <= second.seconds - first.seconds < 3
    assert result["counts"]["failed"] == 0


@pytest.mark.parametrize("bad", [Answer(500, "oops"), Answer(503), Answer(None)])
def test_a_server_error_or_a_lost_connection_is_tried_again(tmp_path, bad):
    run = write_predictions(tmp_path, {10: [2]}, [4])
    with JudgeServer(lambda asked: fair_grades(asked) if asked.number else bad) as server:
        result = ask(run, server)
    assert len(server.asked) == 2
    assert result["scores"]["score"]["mean"] == 50.0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Answer(500, '{"error": "out of\\nmemory"}'), 'status 500 {"error": "out of\\nmemory"}'),
        (Answer(429, "quota"), "status 429 quota"),
        (Answer(400, "too long"), "status 400 too long"),
        (Answer(None), "no connection (RemoteProtocolError)"),
        (Answer(delay=2.0), "no answer within 0.3 seconds"),
        (Answer(200, "<html>hello</html>"), "status 200, but no chat completion: <html>hello"),
        (Answer(200, '{"choices": []}'), 'status 200, but no chat completion: {"choices": []}'),
    ],
)
def test_a_question_that_fails_is_counted_explained_and_asked_again_next_time(
    tmp_path, bad, reason
):
    run = write_predictions(tmp_path, {10: [2, 4, 9]}, [4, 4, 9])
    with JudgeServer(lambda a: bad if "request 1" in a.text else fair_grades(a)) as server:
        result = ask(run, server, timeout=0.3, max_retries=0)
        assert result["counts"]["failed"] == 1
        assert result["counts"]["judged"] == 2
        assert [(r.startswith(reason), n) for r, n in result["failures"].items()] == [(True, 1)]
        assert result["scores"]["score"]["mean"] == pytest.approx(100 * 11 / 13)
        server.answer = fair_grades
        before = len(server.asked)
        mended = ask(run, server)
        assert len(server.asked) == before + 1
    assert mended["failures"] == {}
    assert mended["scores"]["score"]["mean"] == pytest.approx(100 * 15 / 17)


def test_an_unreachable_server_ends_in_one_sentence_after_bounded_retries(tmp_path):
    run = write_predictions(tmp_path, {10: [2] * 20}, [4] * 20)
    server = JudgeServer(fair_grades)
    with server:
        pass
    start = time.monotonic()
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ gave no reply \(no connection") as caught:
        ask(run, server)
    assert time.monotonic() - start < 10
    assert "0 of 20 questions are done and kept" in str(caught.value)
    assert not (run / "judge" / "test.json").exists()


def test_a_server_that_only_fails_is_left_alone_soon(tmp_path):
    run = write_predictions(tmp_path, {10: [2] * 50}, [4] * 50)
    with (
        JudgeServer(lambda asked: Answer(500, "broken")) as server,
        pytest.raises(UserError, match="status 500 broken"),
    ):
        ask(run, server, max_retries=0, max_concurrency=1)
    assert len(server.asked) <= MAX_FAILURES_IN_A_ROW + 1


def test_a_refused_key_stops_at_once_and_is_nowhere_to_be_read(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    run = write_predictions(tmp_path, {10: [2] * 20}, [4] * 20)

    def answer(asked: Asked) -> Answer:
        return Answer(401, f"this is no key: {asked.headers['authorization']}")

    with JudgeServer(answer) as server, pytest.raises(UserError) as caught:
        ask(run, server, max_concurrency=1)
    assert "no key: Bearer [key]" in str(caught.value)
    assert "the key in OPENAI_API_KEY" in str(caught.value)
    assert len(server.asked) <= 2
    out, err = capfd.readouterr()
    assert KEY not in texts_of(tmp_path) + str(caught.value) + out + err


def test_a_key_is_sent_and_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    run = write_predictions(tmp_path, {10: [2, 3]}, [4, 4])

    def answer(asked: Asked) -> Answer:
        return says(f"{asked.headers['authorization']} {asked.number}")

    with JudgeServer(answer) as server:
        ask(run, server, api_key_variable="JUDGE_KEY")
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert "Bearer [key]" in texts_of(run / "judge")
    assert KEY not in texts_of(run)


def test_without_its_key_no_other_key_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    run = write_predictions(tmp_path, {10: [2]}, [4])
    with JudgeServer(fair_grades) as server:
        ask(run, server, api_key_variable="JUDGE_KEY")
    assert "authorization" not in server.asked[0].headers


def test_a_judge_whose_server_goes_away_finishes_later_without_asking_twice(tmp_path):
    run = write_predictions(tmp_path, {10: [*range(1, 11)], 20: [*range(10, 0, -1)]}, [5] * 10)
    with JudgeServer(fair_grades) as whole:
        expected = ask(run, whole, output=tmp_path / "uninterrupted")

    def answer(asked: Asked) -> Answer:
        return fair_grades(asked) if asked.number < 7 else Answer(None)

    with JudgeServer(answer) as server, pytest.raises(UserError, match="7 of 20 questions"):
        ask(run, server, max_retries=0)
    with JudgeServer(fair_grades) as later:
        result = ask(run, later)
    answered = {asked.text for asked in server.asked[:7]}
    assert len(later.asked) == 13
    assert answered.isdisjoint(asked.text for asked in later.asked)
    assert (result["counts"]["asked"], result["counts"]["cached"]) == (13, 7)
    assert result["scores"] == expected["scores"]


def test_a_killed_judge_finishes_later_without_asking_twice(tmp_path):
    run = write_predictions(tmp_path, {10: [*range(1, 11)], 20: [*range(10, 0, -1)]}, [5] * 10)
    program = (
        "import sys; from promptkd.judge.judge import judge; "
        "judge(sys.argv[1], 'test.jsonl', base_url=sys.argv[2], model='grader', max_concurrency=2)"
    )

    with JudgeServer(lambda asked: replace(fair_grades(asked), delay=0.05)) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(run), server.base_url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(server.asked) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        num_before = len(server.asked)
        assert 8 <= num_before < 20
        result = ask(run, server)
    times = Counter(asked.text for asked in server.asked)
    assert len(times) == 20
    assert max(times.values()) <= 2
    assert sum(times.values()) <= 20 + 2  # the two that were under way when it was killed
    assert result["counts"]["judged"] == 20
    assert result["counts"]["cached"] >= num_before - 2


@pytest.mark.real
def test_a_served_model_is_asked_kept_and_counted(tmp_path):
    pytest.importorskip("uvicorn", reason="transformers serve needs transformers[serving]")
    tiny.model("llama").save_pretrained(tmp_path / "grader")
    tiny.tokenizer(chat_template=True).save_pretrained(tmp_path / "grader")
    run = write_predictions(tmp_path / "run", {10: [2, 3, 4]}, [5, 5, 5])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "grader"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
        )
    options: dict[str, Any] = {"model": str(tmp_path / "grader"), "max_reply_tokens": 8}
    try:
        wait_for_port(port, seconds=120)
        root = f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=r"status 404 .* Check the address"):
            judge(run, "test.jsonl", base_url=root, **options)
        first = judge(run, "test.jsonl", base_url=f"{root}/v1", max_reasks=1, **options)
    finally:
        server.terminate()
        server.wait()
    again = judge(run, "test.jsonl", base_url=f"{root}/v1", max_reasks=1, **options)
    assert first["counts"] == {  # random weights never write two grades
        "pairs": 3,
        "judged": 0,
        "asked": 6,
        "cached": 0,
        "malformed": 6,
        "failed": 0,
    }
    assert again["counts"] == first["counts"] | {"asked": 0, "cached": 6}


def wait_for_port(port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server never listened"
            time.sleep(0.1)
