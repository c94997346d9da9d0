"""Every command that takes more than a few seconds shows a bar, and errors come after its end."""

import contextlib
import re
from pathlib import Path

import pytest

import runs
import tiny
from judge_server import JudgeServer, says
from promptkd.evaluation.evaluate import evaluate_with
from promptkd.generation.responses_bar import responses_bar, unseen
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine

FINISHED = re.compile(r"100%\|.*\| ([\d.]+)/\1 \[\d\d:\d\d<00:00")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A finished run that was evaluated, its recipe and its data."""
    directory = tmp_path_factory.mktemp("progress")
    tiny.save_pair(directory)
    data = tiny.write_data(directory / "train.jsonl")
    recipe = tiny.recipe(
        directory,
        method={"name": "promptkd", "length": 2},
        data={"validation": str(data)},
        optimization={"max_steps": 2},
    )
    runs.write_recipe(directory, recipe)
    evaluate_with(runs.train(recipe), ["start"], str(data), num_examples=3, seeds=(1,))
    return directory


def commands(place: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What is typed, and what its bars say."""
    run, data = str(place / "run"), str(place / "train.jsonl")
    pruned = ["--teacher", str(place / "teacher"), "--layers", "1", "--output", str(place / "cut")]
    sampled = ["--data", data, "--num-examples", "3", "--seeds", "1"]
    both = ["the student responds", "the teacher responds", "errors on either's text"]
    voices = ["the student responds"]
    return {
        "evaluate": (["evaluate", run, *sampled, "2"], ["responses to train"]),
        "exposure-bias": (["exposure-bias", run, *sampled], both),
        "analyse-prompt": (["analyse-prompt", run, "--num-examples", "2"], ["validation: KLs"]),
        "generate": (["generate", run, "Count to three."], voices),
        "report": (["report", run], ["drawing the report"]),
        "rescore": (["rescore", run], ["scoring anew"]),
        "init-student": (["init-student", *pruned, "--calibration", data], ["measuring layers"]),
        "check": (
            ["check", str(place / "recipe.yaml"), f"output={place}/other"],
            ["first steps"],
        ),
        "train": (
            ["train", str(place / "recipe.yaml"), f"output={place}/again"],
            ["promptkd"],
        ),
    }


NAMES = [*commands(Path())]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_shows_a_bar_that_fills_up(place, tmp_path, name):
    typed, said = commands(place)[name]
    expect_full_bars(runs.run(typed, tmp_path), said)


def test_the_judge_shows_a_bar_that_fills_up(place, tmp_path):
    typed = ["judge", str(place / "run"), "--data", str(place / "train.jsonl"), "--model", "any"]
    with JudgeServer(lambda asked: says("5 4\nFine.")) as server:
        outcome = runs.run([*typed, "--base-url", server.base_url], tmp_path)
    expect_full_bars(outcome, ["judge"])


def expect_full_bars(outcome: runs.Outcome, said: list[str]) -> None:
    assert outcome.status == 0, outcome.stderr
    drawn = re.split(r"[\r\n]", outcome.stderr)
    assert any(re.search(r"(^|\s)0%\|", line) for line in drawn)
    for words in said:
        own = [line for line in drawn if words in line]
        assert any(FINISHED.search(line) for line in own), f"{words}: {own[-1:]}"


@pytest.mark.parametrize("stop", [(), tuple(range(0, tiny.ROWS, 2))])
def test_an_engine_counts_every_response_once_however_it_ends(stop):
    engine = TransformersEngine(tiny.language_model(tiny.model("llama")), stop)
    counted: list[float] = []
    engine.progress = counted.append
    requests, seeds = [(5, 6), (7,), (8, 9, 10)], [(0,), (1,), (2,)]
    engine.generate(requests, seeds, GenerationSettings(7), max_batch_tokens=20)
    assert sum(counted) == pytest.approx(3)
    assert min(counted) >= 0


def test_an_engine_is_left_alone_after_an_error():
    engine = TransformersEngine(tiny.language_model(tiny.model("llama")), ())
    with contextlib.suppress(KeyError), responses_bar(engine, 1, "writes"):
        assert engine.progress is not unseen
        raise KeyError
    assert engine.progress is unseen


def test_an_error_is_printed_after_the_bar_has_ended(place, tmp_path):
    other = runs.write_recipe(
        tmp_path,
        tiny.recipe(
            place,
            method={"name": "kd"},
            optimization={"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 1e30},
            output=str(tmp_path / "run"),
        ),
    )
    outcome = runs.run(["train", other, "optimization.max_steps=4"], tmp_path / "out")
    assert outcome.status == 1
    assert outcome.stderr.splitlines()[-1].startswith("promptkd: ")
    assert "%|" not in outcome.stderr.splitlines()[-1]
