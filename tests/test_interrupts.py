"""Ctrl-C and SIGTERM end every command in one sentence; what it was writing is not there."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

import runs
import tiny
from judge_server import JudgeServer, says
from promptkd.cli import main

AT: dict[str, str] = {}
"""Signal and moment: the next audit event of that name whose arguments hold the text."""


def _interrupt(event: str, arguments: tuple[object, ...]) -> None:
    here = AT.get("event") == event and any(AT.get("text", "") in str(one) for one in arguments)
    if here and (name := AT.pop("signal", None)):  # of several threads, one
        AT.clear()
        os.kill(
            os.getpid(), signal.Signals[name]
        )  # as a terminal does: a thread that waits is woken


sys.addaudithook(_interrupt)

COMMANDS = {
    "init-student": ("--teacher PAIR/teacher --layers 1 --output OUT", ".writing-"),
    "check": ("RECIPE", "train.jsonl"),
    "train": ("RECIPE", "train.jsonl"),
    "distill": ("--teacher PAIR/teacher --data DATA --output OUT", ".writing-order"),
    "generate": ("RUN Hi", "environment.json"),
    "evaluate": ("RUN --data DATA --seeds 2 --output OUT", ".writing-train.predictions"),
    "rescore": ("RUN", ".writing-train.predictions"),
    "compare": ("RUN RUN", "train.predictions"),
    "exposure-bias": ("RUN --num-examples 2 --seeds 1", ".writing-exposure_bias"),
    "analyse-prompt": ("RUN --num-examples 1", ".writing-prompt_analysis"),
    "study": ("STUDY", ".writing-train.predictions"),
    "report": ("RUN", ".writing-report"),
}
"""Their arguments, and the file at whose opening somebody interrupts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A pair, its data, a finished run that was evaluated, a recipe and a study."""
    directory = tmp_path_factory.mktemp("place")
    tiny.save_pair(directory)
    data = str(tiny.write_data(directory / "train.jsonl", 4))
    shorter = {"max_response_tokens": 4, "validation": data}
    raw = tiny.recipe(directory, optimization={"max_steps": 1}, data=shorter)
    runs.train(raw)
    runs.write_recipe(directory, raw | {"output": str(directory / "next")})
    base = {key: raw[key] for key in raw if key not in ("method", "output")}
    scoring = {"suite": {"train": data}, "seeds": [1], "num_examples": 1}
    study = {"base": base, "methods": {"sft": {"method": {"name": "sft"}}}, "seeds": [0]}
    study |= {"evaluation": scoring, "output": str(directory / "study")}
    (directory / "study.yaml").write_text(yaml.safe_dump(study))
    typed(directory, "evaluate", "RUN --data DATA --seeds 2", status=0)
    return directory


def typed(place: Path, name: str, arguments: str, status: int) -> None:
    """Type a command; OUT is a directory that doesn't exist."""
    words = {"RUN": "run", "RECIPE": "recipe.yaml", "STUDY": "study.yaml", "DATA": "train.jsonl"}
    for word, file in {"PAIR": "", "OUT": "out", **words}.items():
        arguments = arguments.replace(word, str(place / file))
    with pytest.raises(SystemExit) as end:
        main([name, *arguments.split()])
    assert end.value.code == status


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, signal.SIGINT) for name in COMMANDS),
        ("train", signal.SIGTERM),
        ("evaluate", signal.SIGTERM),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_signal_ends_a_command_in_a_sentence_with_nothing_half_written(
    place, capfd, name, number
):
    arguments, text = COMMANDS[name]
    before = runs.everything(place)
    AT.update(event="open", text=text, signal=number.name)
    typed(place, name, arguments, status=128 + number)

    assert not AT, "the moment never came"
    said = capfd.readouterr().err
    assert "promptkd: interrupted. What was saved is intact: the same command goes on." in said
    assert "Traceback" not in said
    after = runs.everything(place)
    assert not [name for name in after if ".writing-" in name]
    written = text.removeprefix(".writing-")
    assert [n for n in before if before[n] != after.get(n) and written in n] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_who_stops_the_judge_waits_for_no_answer(place, capfd, number):
    with JudgeServer(lambda asked: says("5 5", delay=600)) as server:
        AT.update(event="socket.connect", text="127.0.0.1", signal=number.name)
        started = time.monotonic()
        address = f"--base-url {server.base_url} --model grader"
        typed(place, "judge", f"RUN --data DATA {address}", status=128 + number)
        took = time.monotonic() - started

    assert took < 300  # of a busy machine; the answer comes after 600
    assert "promptkd: interrupted." in capfd.readouterr().err
    assert not list((place / "run" / "judge").glob("*.json"))


def test_a_file_that_ends_too_early_is_no_ctrl_d(capfd, monkeypatch):
    """Click ends a command at EOFError without a word, as at the end of typed input."""

    def cut(*_arguments: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("promptkd.config.load_recipe", cut)
    with pytest.raises(SystemExit) as end:
        main(["train", os.devnull])
    assert end.value.code == 70
    assert "a defect of promptkd ended this command (EOFError" in capfd.readouterr().err
