"""Several models by one protocol, and another evaluation's protocol without repeating it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import runs
import tiny
from promptkd.config import load_recipe
from promptkd.errors import UserError
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.evaluate import evaluate, evaluate_with
from promptkd.evaluation.protocol import Protocol
from promptkd.evaluation.rescoring import rescore
from promptkd.report.places import read_subject
from promptkd.run import TrainedRun

SETTINGS = ("decoding", "seeds", "num_examples", "template", "max_request_tokens", "dtype", "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run in a directory of ``distill``, whose scores ask four models."""
    directory = tmp_path_factory.mktemp("path")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "test.jsonl", 6)
    made = runs.train(
        tiny.recipe(
            directory,
            data={"max_request_tokens": 9, "max_response_tokens": 8},
            sampling={"temperature": 0.7, "top_k": 30},
            optimization={"max_steps": 2},
        )
    )
    tiny.save_pair(directory / "earlier")
    models = {
        "start": str(directory / "earlier" / "student"),
        "warm-up": str(directory / "student"),
        "promptkd": str(made),
        "teacher": str(directory / "teacher"),
    }
    (directory / "stages").mkdir()
    stage = {"command": "evaluate", "models": models, "output": "scores"}
    (directory / "stages" / "6-scores.yaml").write_text(yaml.safe_dump(stage, sort_keys=False))
    return made


@pytest.fixture(scope="module")
def scored(run) -> dict[str, dict[str, dict[str, Any]]]:
    asked = ("start", "warm-up", "teacher")
    data = [str(run.parent / "test.jsonl")]
    return evaluate_with(
        run, asked, data, seeds=(3, 4), metrics=["distinct_2"], no_repeat_ngram_size=6
    )


def settings(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in SETTINGS}


def test_all_models_of_a_call_are_asked_alike_and_named(run, scored):
    names = {"student": run, "start": run.parent / "earlier" / "student"}
    names |= {"warm-up": run.parent / "student", "teacher": run.parent / "teacher"}
    assert list(scored) == list(names)
    own = scored["student"]["test"]
    assert own["decoding"]["temperature"] == 0.7
    assert own["max_request_tokens"] == 9
    for label, found in scored.items():
        assert found["test"]["model"] == str(names[label])
        assert settings(found["test"]) == settings(own)
        place = run / "evaluation" / ("" if label == "student" else label) / "test.json"
        assert json.loads(place.read_text()) == found["test"]
        assert ("reverse_kl_to_teacher" in found["test"]["scores"]) == (label != "teacher")


def test_comparing_and_scoring_anew_find_each_models_own(run, scored):
    rows = {row.score: row for row in compare(run, run / "evaluation" / "start")}
    assert rows["rouge_l"].first == pytest.approx(
        scored["student"]["test"]["scores"]["rouge_l"]["mean"]
    )
    before = runs.everything(run / "evaluation").keys()
    again = rescore(run)
    assert again.keys() == {"test", "start/test", "warm-up/test", "teacher/test"}
    assert runs.everything(run / "evaluation").keys() == before
    assert again["start/test"]["model"].endswith("earlier/student")


def test_a_report_has_all_of_them_on_one_data_set(run, scored):
    (data,) = read_subject([run]).data_sets()
    assert {(m.label, m.role) for m in data.models} >= {("run", "run"), ("teacher", "teacher")}
    assert len(data.models) == 4


def test_a_directory_of_distill_means_its_student(run, tmp_path):
    found = evaluate_with(
        run.parent, (), str(run.parent / "test.jsonl"), seeds=(3,), output=tmp_path
    )
    assert found["student"]["test"]["model"] == str(run)


def test_a_name_that_the_run_does_not_know_is_refused_before_anything_is_loaded(run):
    with pytest.raises(UserError, match="has no model 'warmup'; did you mean 'warm-up'"):
        evaluate_with(run, ["warmup"], "nowhere.jsonl")
    with pytest.raises(UserError, match="neither a run"):
        evaluate_with(run.parent / "teacher", ["start"], "nowhere.jsonl")


def test_a_model_is_asked_like_a_run_was_without_repeating_anything(run, scored, tmp_path):
    model = str(run.parent / "student")
    found = evaluate(model, like=run, output=tmp_path)
    expected = scored["warm-up"]["test"]
    assert settings(found["test"]) == settings(expected)
    assert found["test"]["scores"] == expected["scores"]
    lines = [runs.json_lines(d / "test.predictions.jsonl") for d in (tmp_path, run / "evaluation")]
    assert [r["request"] for r in lines[0]] == [r["request"] for r in lines[1]]
    assert compare(tmp_path, run)


def test_responses_are_likely_under_the_teacher_as_the_teacher_itself_says(run, tmp_path):
    data, name = str(run.parent / "test.jsonl"), "teacher_cross_entropy"
    found = evaluate(
        run, data, seeds=(3,), metrics=[name], precision="fp32", output=tmp_path, num_examples=3
    )
    teacher = AutoModelForCausalLM.from_pretrained(run.parent / "teacher", dtype=torch.float64)
    tokenizer = tiny.tokenizer()
    total, num_tokens = 0.0, 0
    for row in runs.json_lines(tmp_path / "test.predictions.jsonl"):
        if not row["ended"] and len(row["response"]) == row["num_tokens"]:  # its tokens, exactly
            request, response = (tokenizer(row[k]).input_ids for k in ("request", "response"))
            logits = teacher(torch.tensor([request + response])).logits[0, len(request) - 1 : -1]
            own = torch.nn.functional.cross_entropy(logits, torch.tensor(response)).item()
            assert row[name] == pytest.approx(own, rel=1e-4)
            num_tokens += len(response)
        total += row[name] * row["num_tokens"]
    assert num_tokens > 0
    rows = runs.json_lines(tmp_path / "test.predictions.jsonl")
    mean = total / sum(row["num_tokens"] for row in rows)
    assert found["scores"][name]["mean"] == pytest.approx(mean)


def test_what_is_given_beside_like_is_asked_otherwise(run, scored, tmp_path):
    data = str(tiny.write_data(tmp_path / "more.jsonl", 3))
    found = evaluate(run, data, like=run, seeds=(9,), temperature=0.0, output=tmp_path / "out")
    assert (found["seeds"], found["num_examples"]) == ([9], 3)
    assert found["decoding"] == scored["student"]["test"]["decoding"] | {"temperature": 0.0}


def test_like_needs_an_evaluation_of_one_kind(run, scored, tmp_path):
    with pytest.raises(UserError, match="holds no evaluation to follow"):
        evaluate(run, like=tmp_path, output=tmp_path / "out")
    data = str(run.parent / "test.jsonl")
    evaluate(run, {"a": data}, seeds=(1,), num_examples=2, output=tmp_path)
    evaluate(run, {"b": data}, seeds=(2,), num_examples=2, output=tmp_path)
    with pytest.raises(UserError, match="was evaluated in 2 ways \\(a, b\\)"):
        evaluate(run, like=tmp_path, output=tmp_path / "out")


def test_two_processes_share_the_requests_and_write_what_one_does(run, scored, tmp_path):
    arguments = ["evaluate", str(run), "--like", str(run), "--output", str(tmp_path / "two")]
    outcomes = runs.run_on_ranks(arguments, tmp_path / "out", 2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert outcomes[1].stdout == ""
    place = tmp_path / "two" / "test.predictions.jsonl"
    own, shared = (
        [{k: v for k, v in row.items() if k != "reverse_kl_to_teacher"} for row in rows]
        for rows in (
            runs.json_lines(run / "evaluation" / "test.predictions.jsonl"),
            runs.json_lines(place),
        )
    )
    assert shared == own


def test_a_run_is_evaluated_with_the_engine_that_it_wrote_with(run):
    recipe = load_recipe(run / "recipe.yaml", ["sampling.engine=vllm"])
    assert Protocol.of(TrainedRun(run, recipe), {}).engine == "vllm"
    assert Protocol.of(TrainedRun(run, recipe), {"engine": "transformers"}).engine == "transformers"
    assert Protocol.of(None, {}).engine == "auto"


def test_the_command_names_every_model(run, scored, tmp_path):
    arguments = ["evaluate", str(run), "--like", str(run), "--with", "start,teacher"]
    outcome = runs.run([*arguments, "--output", str(tmp_path / "s")], tmp_path / "out")
    assert outcome.status == 0, outcome.stderr
    said = [line for line in outcome.stdout.splitlines() if line.startswith("---")]
    assert said == ["--- student", "--- start", "--- teacher"]
    assert (tmp_path / "s" / "teacher" / "test.json").is_file()
