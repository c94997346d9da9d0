"""A run directory holds what docs/run-directory.md promises, and knows whose it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
import tiny
from promptkd.config import load_recipe, recipe_from_dict
from promptkd.errors import UserError
from promptkd.methods import build_method
from promptkd.ranks import Ranks
from promptkd.rollouts import Rollout
from promptkd.training.identity import changes, identity
from promptkd.training.run_directory import RunDirectory
from promptkd.training.step import Cost, StepMetrics
from promptkd.training.tracking import JsonLines, describe_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run of promptkd with validation, and its raw recipe."""
    directory = tmp_path_factory.mktemp("finished")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 5)
    raw = tiny.recipe(
        directory,
        data={"validation": str(directory / "valid.jsonl"), "max_response_tokens": 6},
        optimization={"max_steps": 4},
        evaluation={"every_steps": 2, "metric": "reverse_kl_to_teacher"},
        checkpoints={"every_steps": 2, "keep": 1},
    )
    return runs.train(raw), raw


def test_a_finished_run_holds_every_promised_file_and_nothing_half_written(finished):
    run, _ = finished
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}

    assert {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "checkpoints/step-000004/manifest.json",
        "student/model.safetensors",
        "student/config.json",
        "student/tokenizer.json",
        "student/README.md",
        "teacher_adapter/adapter_config.json",
        "teacher_adapter/adapter_model.safetensors",
    } <= found
    assert not list(run.rglob(".*"))


def test_the_student_loads_with_transformers_and_the_adapter_with_peft(finished):
    run, raw = finished
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    teacher = AutoModelForCausalLM.from_pretrained(raw["teacher"]["model"])
    adapted = PeftModel.from_pretrained(teacher, str(run / "teacher_adapter"))

    saved = load_file(run / "student" / "model.safetensors")
    assert saved.keys() <= student.state_dict().keys()
    assert AutoTokenizer.from_pretrained(run / "student").get_vocab() == (
        tiny.tokenizer().get_vocab()
    )
    assert adapted.peft_config["default"].num_virtual_tokens == 7
    assert adapted.peft_config["default"].base_model_name_or_path == raw["teacher"]["model"]


def test_the_recorded_recipe_is_the_resolved_one(finished):
    run, raw = finished

    assert load_recipe(run / "recipe.yaml") == recipe_from_dict(raw)


def test_the_environment_says_what_ran_where(finished):
    run, _raw = finished
    record = json.loads((run / "environment.json").read_text())

    assert record["identity"]["method"] == repr(build_method("promptkd"))
    assert record["identity"]["recipe"]["seed"] == 0
    environment = record["environment"]
    assert {"promptkd", "torch", "transformers"} <= environment["packages"].keys()
    assert {"python", "platform", "cpu", "threads", "device", "commit"} <= environment.keys()


def test_there_is_one_line_per_step_and_one_per_evaluation(finished):
    run, _ = finished
    rows = runs.json_lines(run / "metrics.jsonl")

    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "evaluation" in row] == [0, 2, 4]
    step = rows[1]
    assert (step["student_share"], step["num_responses"]) == (1, 4)
    assert step["num_tokens"] == 4 * step["response_length"]
    assert {"kl_teacher_student", "kl_teacher_plain", "gradient_norm_student"} <= step.keys()


@pytest.mark.parametrize(
    ("authors", "length", "ended"),
    [("srr", 5, 0), ("ssr", 4, 0.5), ("rr", 2, 1)],
    ids=["one of its own", "two", "none"],
)
def test_lengths_and_endings_are_those_of_the_students_own_responses(authors, length, ended):
    end = 1
    given = Rollout(0, (7,), (7, end), "reference")
    own = iter([Rollout(0, (7,), (7,) * 5, "student"), Rollout(0, (7,), (7, 7, end), "student")])
    responses = [next(own) if author == "s" else given for author in authors]
    metrics = StepMetrics(Cost(torch.device("cpu")), num_compared=0)
    row = describe_step(0, [responses], metrics, [end], Ranks())

    assert (row["response_length"], row["share_ended"]) == (length, ended)
    assert (row["num_responses"], row["student_share"]) == (
        len(authors),
        authors.count("s") / len(authors),
    )
    assert row["num_tokens"] == sum(len(response.response_ids) for response in responses)


def test_samples_can_be_read_beside_their_references(finished):
    run, _ = finished
    rows = runs.json_lines(run / "samples.jsonl")

    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [4] * 4
    assert rows[0]["request"] == "say 0"
    assert rows[0]["references"] == ["it is 0!"]


def test_the_summary_names_the_best_evaluation_and_the_card_repeats_it(finished):
    run, _ = finished
    best = json.loads((run / "summary.json").read_text())["best"]
    by_step = {
        row["step"]: row["evaluation"]
        for row in runs.json_lines(run / "metrics.jsonl")
        if "evaluation" in row
    }

    measured = {step: scores["reverse_kl_to_teacher"] for step, scores in by_step.items() if step}
    assert best["step"] == min(measured, key=lambda step: measured[step])
    assert best["scores"] == by_step[best["step"]]
    card = (run / "student" / "README.md").read_text()
    start = by_step[0]["reverse_kl_to_teacher"]
    assert f"| reverse_kl_to_teacher | {start:.4g} | {best['value']:.4g} |" in card
    assert f"this is step {best['step']}" in card


def test_the_output_and_the_trackers_may_change_but_nothing_else(finished):
    _run, raw = finished
    method = build_method("promptkd")
    RunDirectory(recipe_from_dict(raw | {"tracking": ["tensorboard"]}), method)

    with pytest.raises(UserError, match=r"different recipe \(seed 0 -> 1\)"):
        RunDirectory(recipe_from_dict(raw | {"seed": 1}), method)
    with pytest.raises(UserError, match="different recipe"):
        RunDirectory(recipe_from_dict(raw), build_method("promptkd", length=3))


def test_a_tracker_is_told_the_same_numbers(finished, tmp_path):
    run, raw = finished
    tracked = runs.train(raw | {"tracking": ["tensorboard"], "output": str(tmp_path / "run")})
    (events,) = (tmp_path / "run" / "tracking").rglob("events.*")
    accumulator = event_accumulator.EventAccumulator(str(events.parent)).Reload()

    rows = runs.json_lines(run / "metrics.jsonl")
    assert runs.json_lines(tracked / "metrics.jsonl") == rows
    for name in ("loss", "kl_teacher_student"):
        told = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert told == [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
    assert [event.step for event in accumulator.Scalars("eval_rouge_l")] == [0, 2, 4]


def recorded(raw: dict[str, Any]) -> dict[str, Any]:
    return identity(recipe_from_dict(raw), build_method("promptkd"))


def changed(record: dict[str, Any], raw: dict[str, Any]) -> list[str]:
    found = changes(record, recipe_from_dict(raw), build_method("promptkd"))
    return [str(change) for change in found]


def test_differences_are_named_by_their_dotted_keys():
    raw = tiny.recipe(Path("pair"))
    other = tiny.recipe(Path("pair"), data={"template": "chat", "train": ["b"]})
    record = recorded(raw)

    assert changed(record, raw) == []
    assert changed(record, other) == [
        "data.template 'none' -> 'chat'",
        "data.train ['pair/train.jsonl'] -> ['b']",
    ]
    record["recipe"]["data"]["gone"] = 3
    assert changed(record, raw) == ["data.gone 3 -> None"]


@pytest.mark.parametrize(
    ("section", "key", "default", "other"),
    [
        ("sampling", "top_k", 0, 5),
        ("teacher", "offload", False, True),
        ("optimization", "schedule", "constant", "cosine"),
        ("checkpoints", "keep", 2, 3),
        ("evaluation", None, None, None),
        ("seed", None, None, None),
    ],
)
def test_a_record_without_a_key_that_came_later_is_that_of_its_default(
    section, key, default, other
):
    raw = tiny.recipe(Path("pair"))
    record = recorded(raw)
    if key is None:
        del record["recipe"][section]
        assert changed(record, raw) == []
        return
    assert record["recipe"][section].pop(key) == default
    assert changed(record, raw) == []
    raw[section] = raw.get(section, {}) | {key: other}
    assert changed(record, raw) == [f"{section}.{key} {default!r} -> {other!r}"]


def test_a_composition_is_known_by_a_record_from_before_an_option_and_by_no_other():
    now = build_method("promptkd")
    text = repr(now)
    assert now.is_recorded(text)
    assert now.is_recorded(text.replace(", anneal=True", ""))
    for part, other in (
        (", anneal=True", ", anneal=False"),
        (", weight=1.0", ", weight=2.0"),
        ("seed=0", "seed=1"),
        ("SoftPrompt(", "TextPrompt("),
        ("rollouts=Student(), ", ""),  # no default: it was never left out
        (", anneal=True", ", gone=1"),
    ):
        assert part in text
        assert not now.is_recorded(text.replace(part, other)), (part, other)
    assert not build_method("promptkd", length=3).is_recorded(text)
    record = recorded(tiny.recipe(Path("pair")))
    record["method"] = text.replace("weight=1.0", "weight=2.0")
    assert changed(record, tiny.recipe(Path("pair"))) == [
        "method, composed otherwise under the same name"
    ]


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    raw = tiny.recipe(tmp_path)
    run = runs.train(raw)
    record = json.loads((run / "environment.json").read_text())
    del record["identity"]["recipe"]["sampling"]
    del record["identity"]["recipe"]["teacher"]["offload"]
    method = record["identity"]["method"].replace(", anneal=True", "")
    record["identity"]["method"] = method
    (run / "environment.json").write_text(json.dumps(record))
    raw["optimization"]["max_steps"] = 4

    runs.train(raw)
    assert [row["step"] for row in runs.json_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    changed = json.loads((run / "environment.json").read_text())["changes"]
    assert changed == [{"after_step": 3, "changed": ["optimization.max_steps 3 -> 4"]}]


def test_rewinding_forgets_later_lines_and_an_unfinished_one(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.rewind(3)
    assert not lines.path.exists()
    lines.append({"step": step, "text": "ü\u2028"} for step in (0, 1, 2, 2, 3))
    with open(lines.path, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    lines.rewind(2)

    assert [row["step"] for row in lines.read()] == [0, 1, 2, 2]
    assert lines.read()[0]["text"] == "ü\u2028"
    lines.append([{"step": 3}])
    assert [row["step"] for row in lines.read()] == [0, 1, 2, 2, 3]
    lines.rewind(-1)
    assert lines.path.read_text() == ""
