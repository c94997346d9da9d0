"""The whole path, through the command line: stages, their files, what stops it and goes on."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
import tiny
from promptkd.data import overlap, read_examples
from promptkd.distillation.data import read_rows, to_row
from promptkd.distillation.plan import Facts, Order, plan
from promptkd.distillation.scores import score_models
from promptkd.distillation.teacher_check import verdict
from promptkd.errors import UserError
from promptkd.files import write_json_lines
from runs import Moment

NAMES = ["teacher-check", "student-init", "warm-up", "promptkd", "scores", "report"]
FAST = (
    *("data.template=none", "data.max_response_tokens=12", "precision=fp32"),
    *("warm-up.optimization.max_steps=2", "warm-up.checkpoints.every_steps=1"),
    *("promptkd.optimization.max_steps=2", "promptkd.checkpoints.every_steps=1"),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl", 40)
    tiny.write_data(directory / "requests.jsonl", 40, with_output=False)
    return directory


def arguments(pair: Path, output: Path, *more: Any, data: str = "train.jsonl") -> list[str]:
    start = ("distill", "--teacher", pair / "teacher", "--data", pair / data)
    return [str(a) for a in (*start, "--output", output, *more, "--set", *FAST)]


def stages(output: Path) -> dict[str, dict[str, Any]]:
    files = sorted((output / "stages").glob("*.yaml"))
    return {file.stem.partition("-")[2]: yaml.safe_load(file.read_text()) for file in files}


def scores(output: Path, label: str) -> dict[str, Any]:
    return json.loads((output / "scores" / label / "held_out.json").read_text())["scores"]


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> tuple[Path, runs.Outcome]:
    """An uninterrupted path."""
    directory = tmp_path_factory.mktemp("whole")
    outcome = runs.run(arguments(pair, directory / "out", "--layers", 2), directory)
    assert outcome.status == 0, outcome.stderr
    return directory / "out", outcome


def test_the_stages_are_files_that_say_what_was_done(whole):
    output, outcome = whole
    assert [*stages(output)] == NAMES
    for number, name in enumerate(NAMES, 1):
        assert f"{number}/6 {name}: " in outcome.stdout
    recipe = (output / "promptkd" / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["optimization"]["max_steps"] == 2
    assert (output / "report.html").is_file()
    assert outcome.stdout.endswith(f"report: {output / 'report.html'}\n")


def test_all_models_are_scored_on_rows_that_nobody_learnt_from(whole):
    output, outcome = whole
    rows = {
        name: {e.instruction for e in read_examples(str(output / "data" / f"{name}.jsonl"))}
        for name in ("train", "validation", "held_out")
    }
    assert sum(map(len, rows.values())) == len(set().union(*rows.values())) == 40
    assert {path.name for path in (output / "scores").iterdir()} == {
        *("start", "warm-up", "promptkd", "teacher")
    }
    for label in ("start", "warm-up", "promptkd"):
        assert scores(output, label)["reverse_kl_to_teacher"]["mean"] > 0
    assert "it generates" in outcome.stdout
    assert "exact match, %" in outcome.stdout


def test_the_same_command_on_a_finished_path_changes_nothing(whole, pair, tmp_path):
    output, _ = whole
    before = runs.everything(output)
    outcome = runs.run(arguments(pair, output, "--layers", 2), tmp_path)
    assert outcome.status == 0
    assert outcome.stdout.count("done: ") == len(NAMES)
    assert runs.everything(output) == before


def test_killed_in_every_stage_the_same_command_ends_as_if_it_had_not_been(whole, pair, tmp_path):
    typed = arguments(pair, tmp_path / "out", "--layers", 2)
    moments = (
        Moment("open", "3-warm-up.yaml"),
        Moment("open", "1-teacher-check.done.json"),
        Moment("os.rename", "student-init"),
        Moment("os.rename", "warm-up/checkpoints/.writing-step-000001"),
        Moment("os.rename", "promptkd/checkpoints/.writing-step-000001"),
        Moment("open", "5-scores.done.json"),
        Moment("open", "report.html"),
    )
    for moment in moments:
        killed = runs.run(typed, tmp_path / "killed", dies_at=moment)
        assert killed.status == -9, f"{moment.text}: {killed.stderr}"
        assert not (tmp_path / "out" / "report.html").exists()
    again = runs.run(typed, tmp_path / "again")
    assert again.status == 0, again.stderr
    for name in ("warm-up", "promptkd"):
        assert runs.result(tmp_path / "out" / name) == runs.result(whole[0] / name)
    for label in ("start", "promptkd", "teacher"):
        assert scores(tmp_path / "out", label) == scores(whole[0], label)


def test_without_references_the_teacher_writes_what_layers_and_warm_up_need(pair, tmp_path):
    typed = arguments(pair, tmp_path / "out", "--layers", 2, data="requests.jsonl")
    outcome = runs.run(typed, tmp_path)
    assert outcome.status == 0, outcome.stderr
    found = stages(tmp_path / "out")
    assert found["warm-up"]["method"] == {"name": "seqkd", "kl_share": 0.5}
    assert [*found] == [NAMES[0], "calibration", *NAMES[1:]]
    rows = read_examples(found["student-init"]["calibration"])
    assert rows
    assert all(row.responses for row in rows)


def test_a_given_student_is_not_pruned_and_the_tuned_teacher_is_its_teacher(pair, tmp_path):
    typed = arguments(
        *(pair, tmp_path / "out", "--student", pair / "student", "--method", "gkd"),
        *("--tune-teacher", "whole", "--held-out", pair / "requests.jsonl"),
    )
    typed = [a.replace("promptkd.", "gkd.") for a in typed] + ["teacher.optimization.max_steps=2"]
    refused = runs.run(typed, tmp_path)
    assert refused.status == 1
    assert "0 rows are left to learn from" in refused.stderr
    (tmp_path / "other.jsonl").write_text('{"instruction": "what else?", "output": "that"}\n')
    typed[typed.index(str(pair / "requests.jsonl"))] = str(tmp_path / "other.jsonl")
    outcome = runs.run(typed, tmp_path)
    assert outcome.status == 0, outcome.stderr
    found = stages(tmp_path / "out")
    assert [*found] == ["teacher-check", "teacher", "warm-up", "gkd", "scores", "report"]
    tuned = str(tmp_path / "out" / "teacher")
    assert found["teacher"]["method"] == {"name": "sft"}
    assert found["warm-up"]["student"] == {"model": str(pair / "student")}
    assert found["warm-up"]["teacher"]["model"] == found["gkd"]["teacher"]["model"] == tuned
    assert found["scores"]["models"]["teacher"] == tuned


def test_a_budget_chooses_the_steps_and_says_how(pair, tmp_path):
    typed = arguments(pair, tmp_path / "out", "--layers", 2, "--budget", "1h")
    typed = [a for a in typed if "max_steps" not in a]
    outcome = runs.run(typed, tmp_path)
    assert outcome.status == 0, outcome.stderr
    assert "7 steps: 35% of the 60.0 min that are left, at " in outcome.stdout
    assert "no more than 3 epochs" in outcome.stdout
    assert stages(tmp_path / "out")["warm-up"]["optimization"]["max_steps"] == 7


def test_a_stage_that_is_changed_before_it_runs_runs_as_changed_and_later_not(pair, tmp_path):
    output = tmp_path / "out"
    typed = arguments(pair, output, "--layers", 2)
    runs.run(typed, tmp_path / "first", dies_at=Moment("open", "1-teacher-check.done.json"))
    file = output / "stages" / "3-warm-up.yaml"
    file.write_text(file.read_text().replace("max_steps: 2", "max_steps: 3"))
    assert runs.run(typed, tmp_path / "second").status == 0
    assert len(runs.json_lines(output / "warm-up" / "metrics.jsonl")) == 3 + 2

    file.write_text(file.read_text().replace("max_steps: 3", "max_steps: 4"))
    refused = runs.run(typed, tmp_path / "third")
    assert refused.status == 1
    assert f"was changed after it had run. Remove {output / 'warm-up'}" in refused.stderr


def test_another_order_or_other_data_in_the_same_directory_is_refused(whole, pair, tmp_path):
    output, _ = whole
    other = runs.run(arguments(pair, output, "--layers", 1), tmp_path)
    assert other.status == 1
    assert "layers 2 -> 1" in other.stderr
    other = runs.run(arguments(pair, output, "--layers", 2, data="requests.jsonl"), tmp_path)
    assert other.status == 1
    assert "digest of the data" in other.stderr


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--student", "s", "--layers", "2"), "--student and --layers are both given"),
        (("--tune-teacher", "half"), "--tune-teacher is 'half'; known: whole, lora."),
        (("--budget", "soon"), "--budget is 'soon'. Write a number and s, m or h"),
        (("--method", "promptdk"), "did you mean 'promptkd'"),
        (("--layers", "3"), "--layers 3: the teacher has 3 layers, so a student keeps 1 to 2 of"),
        (("--set", "warmup.optimization.max_steps=2"), "'warmup' is no setting"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(pair, tmp_path, given, sentence):
    outcome = runs.run(arguments(pair, tmp_path / "out", *given), tmp_path)
    assert outcome.status == 1
    assert sentence in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_what_needs_references_is_refused_without_them():
    facts = Facts(4, width=32, num_rows=40, has_references=False, lengths={})
    for order in (
        Order("t", Path("o"), tune_teacher="whole"),
        Order("t", Path("o"), method="kd"),
    ):
        with pytest.raises(UserError, match="needs a reference response in every row"):
            plan(order, facts)


def test_a_context_is_read_by_the_teacher_of_every_student_and_by_no_student(tmp_path):
    facts = Facts(num_layers=4, width=576, num_rows=100, has_references=False, lengths={})
    made = plan(Order("t", tmp_path, context="guide.txt"), facts)
    assert made["warm-up"]["teacher"] == made["promptkd"]["teacher"]
    assert made["promptkd"]["teacher"] == {"model": "t", "system": "guide.txt"}
    for stage in ("teacher-check", "scores"):  # where the teacher is asked as it teaches
        assert made.pop(stage)["system"] == "guide.txt"
    assert "guide.txt" not in str({**made, "warm-up": None, "promptkd": None})


def test_scores_ask_the_teacher_with_what_only_it_reads(tmp_path):
    student, teacher = map(str, tiny.save_pair(tmp_path, chat_template=True))
    lines = tiny.write_data(tmp_path / "d").read_text().splitlines()
    guide, rows = "A guide.", [json.loads(line) for line in lines]

    def scores(name: str, told: bool, system: str | None = None) -> dict[str, dict[str, Any]]:
        front = [{"role": "system", "content": guide}] if told else []
        data = tmp_path / f"{name}.jsonl"
        write_json_lines(data, [{"messages": [*front, *turns(row)]} for row in rows])
        found = score_models(
            {"student": student, "teacher": teacher},
            str(data),
            str(tmp_path / name),
            system=system,
            seeds=(1,),
            num_examples=4,
            teacher=teacher,
            template="chat",
            max_request_tokens=64,
            max_response_tokens=16,
        )
        return {
            who: {score: each["mean"] for score, each in own["scores"].items()}
            for who, own in found.items()
        }

    def turns(row: dict[str, str]) -> list[dict[str, str]]:
        said = {"user": row["instruction"], "assistant": row["output"]}
        return [{"role": role, "content": content} for role, content in said.items()]

    briefed, plain, all_told = scores("a", False, guide), scores("b", False), scores("c", True)
    assert briefed["teacher"]["cross_entropy"] == all_told["teacher"]["cross_entropy"]
    assert briefed["teacher"]["cross_entropy"] != plain["teacher"]["cross_entropy"]
    assert briefed["student"]["cross_entropy"] == plain["student"]["cross_entropy"]
    kl = "reverse_kl_to_teacher"
    assert briefed["student"][kl] != plain["student"][kl]


def test_where_there_are_references_half_of_the_requests_learn_from_them(tmp_path):
    found = {}
    for has_references in (True, False):
        facts = Facts(4, width=576, num_rows=100, has_references=has_references, lengths={})
        found[has_references] = plan(Order("t", tmp_path), facts)["promptkd"]["method"]
    assert found[True] == {"name": "promptkd", "rollouts": "mixture", "student_share": 0.5}
    assert found[False] == {"name": "promptkd"}


def test_all_models_are_scored_and_timed_with_the_engine_that_is_asked_for(tmp_path):
    facts = Facts(num_layers=4, width=576, num_rows=100, has_references=True, lengths={})
    asked = Order("t", tmp_path, settings={"sampling": {"engine": "vllm"}})
    for order, engine in ((asked, "vllm"), (Order("t", tmp_path), None)):
        assert plan(order, facts)["scores"].get("engine") == engine


def test_rates_fall_with_the_width_of_the_models():
    facts = Facts(4, width=1152, num_rows=400, has_references=True, lengths={})
    narrow = Facts(4, width=576, num_rows=400, has_references=True, lengths={})
    rates = [
        plan(Order("t", Path("o")), f)["warm-up"]["optimization"]["learning_rate"]
        for f in (facts, narrow)
    ]
    assert rates == [1.5e-4, 3e-4]


def test_rows_are_written_as_they_were_read(tmp_path):
    rows = [
        {"instruction": "a", "input": "b", "output": ["c", "d"]},
        {"request": "only asked"},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "r"},
            ]
        },
    ]
    examples = read_examples(rows)
    assert read_examples([to_row(example) for example in examples]) == examples


def test_rows_of_the_held_out_data_are_never_trained_on():
    rows = [{"instruction": f"question {i}", "output": "x"} for i in range(30)]
    found = read_rows(rows, rows[:5], None)
    held_out = {f"question {i}" for i in range(5)}
    assert {e.instruction for e in found.held_out} == held_out
    assert not held_out & {e.instruction for e in [*found.train, *found.validation]}
    assert "5 rows are in the held-out data: not trained on" in found.notes


@pytest.mark.parametrize(
    ("scores", "doubt"),
    [
        ({"ended": 23.0, "response_length": 60.0, "cross_entropy": 1.5}, "fewer than 80% end"),
        ({"ended": 99.0, "response_length": 10.0, "cross_entropy": 1.5}, "0.2 times the length"),
        ({"ended": 99.0, "response_length": 50.0, "cross_entropy": 3.1}, "more than 2 nats"),
        ({"ended": 99.0, "response_length": 50.0, "cross_entropy": 1.2}, "it does this task"),
    ],
)
def test_a_teacher_that_does_not_do_the_task_yet_is_to_be_tuned(scores, doubt):
    means = {name: {"mean": value} for name, value in scores.items()}
    said = verdict({"scores": means}, [45, 55])
    assert doubt in said
    assert ("--tune-teacher" in said) == (doubt != "it does this task")


def test_the_packaged_reminders_hold_out_words_that_no_training_row_has():
    directory = resources.files("promptkd") / "starter" / "reminders"
    train, held_out = (
        read_examples(str(directory / f"{name}.jsonl")) for name in ("train", "held_out")
    )
    found = overlap(train, held_out)
    assert (len(train), len(held_out), found.exact, found.near) == (560, 64, (), ())
    tasks = [{json.loads(e.responses[0])["task"] for e in part} for part in (train, held_out)]
    assert not tasks[0] & tasks[1]
