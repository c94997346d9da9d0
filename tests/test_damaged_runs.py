"""Damaged files of a finished run: a sentence that names the file, or the result of whole ones."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import runs
import tiny
from promptkd.cli import main

WAYS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "overwritten": lambda content: b"\xff" * len(content),
}
EVALUATE = "evaluate RUN --data DATA --seeds 1 --output OUT"
GENERATE = "generate RUN Hi"
EXPOSURE = "exposure-bias RUN --num-examples 2 --seeds 1"
ANALYSE = "analyse-prompt RUN --num-examples 2"
ADAPTER = "teacher_adapter/adapter_model.safetensors"
PREDICTIONS = "evaluation/train.predictions.jsonl"

MATRIX = [
    *((EVALUATE, f"student/{name}") for name in ("config.json", "model.safetensors")),
    *((EVALUATE, f"student/{name}") for name in ("tokenizer.json", "tokenizer_config.json")),
    *((EVALUATE, f"student/{name}") for name in ("chat_template.jinja", "generation_config.json")),
    *((EVALUATE, name) for name in ("recipe.yaml", "environment.json")),
    *((GENERATE, name) for name in (ADAPTER, "teacher_adapter/adapter_config.json")),
    *((EXPOSURE, name) for name in ("environment.json", "student/chat_template.jinja")),
    *((ANALYSE, name) for name in (ADAPTER, "recipe.yaml")),
    *(("rescore RUN", name) for name in ("evaluation/train.json", PREDICTIONS)),
    *(("compare RUN WHOLE", name) for name in ("evaluation/train.json", PREDICTIONS)),
]
"""Commands, and the file that is damaged."""

SHOWN = (
    *("metrics.jsonl", "samples.jsonl", "summary.json", "environment.json"),
    *("evaluation/train.json", PREDICTIONS, "exposure_bias.json", "prompt_analysis.json"),
    *("judge/train.json", "student/README.md", "recipe.yaml"),
)
"""What the report reads; it says on the page what it couldn't."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A finished run, asked by a chat template, with all that can be measured of it."""
    directory = tmp_path_factory.mktemp("place")
    tiny.save_pair(directory, chat_template=True)
    data = str(tiny.write_data(directory / "train.jsonl", 4))
    shorter = {"max_response_tokens": 4, "validation": data, "template": "auto"}
    shorter |= {"max_request_tokens": 40}
    runs.train(tiny.recipe(directory, optimization={"max_steps": 2}, data=shorter))
    run = directory / "run"
    for command in ("evaluate RUN --data DATA --seeds 1 2", EXPOSURE, ANALYSE):
        assert typed(command, directory, run) == 0
    (run / "judge").mkdir()
    (run / "judge" / "train.json").write_text(json.dumps({"scores": None, "judge": {}}))
    return directory


@pytest.fixture(scope="module")
def undamaged(place, tmp_path_factory) -> Callable[[str], tuple[dict[str, object], str]]:
    """The scores and the words of a command on the whole run; each is run once."""

    @cache
    def of(command: str) -> tuple[dict[str, object], str]:
        run, said = tmp_path_factory.mktemp("whole") / "run", io.StringIO()
        shutil.copytree(place / "run", run)
        with contextlib.redirect_stdout(said):
            assert typed(command, place, run) == 0
        return results(run), said.getvalue().replace(str(run), "")

    return of


@pytest.fixture
def damaged(place, tmp_path):
    """Damages a file of a copy of the run, which it gives."""

    def damage(name: str, way: str) -> Path:
        run = tmp_path / way
        shutil.copytree(place / "run", run)
        (run / name).write_bytes(WAYS[way]((run / name).read_bytes()))
        return run

    return damage


def typed(command: str, place: Path, run: Path) -> int:
    """The exit code; OUT is a directory beside the run."""
    words = {"RUN": str(run), "WHOLE": str(place / "run"), "DATA": str(place / "train.jsonl")}
    words["OUT"] = str(run.with_name(f"{run.name}-out"))
    with pytest.raises(SystemExit) as end:
        main([words.get(word, word) for word in command.split()])
    assert isinstance(end.value.code, int)
    return end.value.code


def results(run: Path) -> dict[str, object]:
    """Every score that stands in the run or beside it."""
    found: dict[str, object] = {}
    for path in (*run.rglob("*.json"), *run.with_name(f"{run.name}-out").rglob("*.json")):
        record = json.loads(path.read_text()) if "checkpoints" not in path.parts else {}
        if isinstance(record, dict) and "scores" in record:
            found[path.name] = record["scores"]
    return found


@pytest.mark.parametrize(
    ("command", "name"), MATRIX, ids=lambda v: v.split()[0] if " " in v else Path(v).name
)
def test_a_command_on_a_damaged_file_is_refused_by_name_or_equal(
    place, undamaged, damaged, capfd, command, name
):
    expected, said = undamaged(command)
    for way in WAYS:
        run = damaged(name, way)
        code = typed(command, place, run)
        out, err = capfd.readouterr()
        if code == 0:
            assert results(run) == expected, way
            assert out.replace(str(run), "") == said, way
        else:
            sentence = err.rpartition("promptkd: ")[2]
            assert (code, "Traceback" in err) == (1, False), (way, err)
            assert str(run) in sentence or Path(name).stem.split("_")[0] in sentence, (way, err)


@pytest.mark.parametrize("name", SHOWN)
def test_a_report_of_a_damaged_file_says_so_on_the_page_or_is_refused(place, damaged, capfd, name):
    for way in WAYS:
        if (name, way) == ("student/README.md", "cut"):
            continue  # half of a text is a text
        run = damaged(name, way)
        code = typed("report RUN", place, run)
        err = capfd.readouterr().err
        assert "Traceback" not in err, (way, err)
        if code == 0:
            assert f"{run / name}" in (run / "report.html").read_text(), way
        else:
            assert (code, str(run / name) in err) == (1, True), (way, err)


def test_a_study_of_a_damaged_score_is_refused_by_its_file(place, tmp_path, capfd):
    """Left out, it would be a table of fewer seeds."""
    base = tiny.recipe(place, data={"max_response_tokens": 4}, optimization={"max_steps": 1})
    base = {key: base[key] for key in base if key not in ("method", "output")}
    scoring = {"suite": {"train": str(place / "train.jsonl")}, "seeds": [1], "num_examples": 2}
    study = {"base": base, "methods": {"sft": {"method": {"name": "sft"}}}, "seeds": [0]}
    study |= {"evaluation": scoring, "output": str(tmp_path / "study")}
    file = runs.write_recipe(tmp_path, study, "study.yaml")
    assert typed(f"study {file}", place, tmp_path) == 0
    scores = tmp_path / "study" / "sft" / "seed-0" / "evaluation"
    for name in ("train.json", "train.predictions.jsonl"):
        whole = (scores / name).read_bytes()
        for way, damage in WAYS.items():
            (scores / name).write_bytes(damage(whole))
            capfd.readouterr()
            assert typed(f"study {file} --table-only", place, tmp_path) == 1, (name, way)
            assert str(scores / name) in capfd.readouterr().err, (name, way)
        (scores / name).write_bytes(whole)
    assert typed(f"study {file} --table-only", place, tmp_path) == 0
