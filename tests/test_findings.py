"""What goes wrong while training is found in the metrics, said once, and has a documented code."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from promptkd.config import recipe_from_dict
from promptkd.findings import CHECKS
from promptkd.methods import build_method
from promptkd.training.forecast import Measured, Schedule, forecast
from promptkd.training.trainer import Trainer
from promptkd.training.warnings import Watch, training_warnings

PACKAGE = Path(__file__).parents[1] / "src" / "promptkd"


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A line of a healthy step of 16 responses."""
    return {
        "step": number,
        "loss": 1.0,
        "student_share": 1.0,
        "num_responses": 16,
        "num_tokens": 480,
        "response_length": 30.0,
        "num_empty": 0,
        "share_ended": 0.9,
        "gradient_norm_student": 1.0,
    } | changes


def evaluation(number: int, kl: float) -> dict[str, Any]:
    return {"step": number, "evaluation": {"reverse_kl_to_teacher": kl}}


def codes(history: list[dict[str, Any]]) -> list[str]:
    return [finding.code for finding in training_warnings(history)]


def colluding(kls: tuple[float, float, float], moved: tuple[float, float]) -> list[dict[str, Any]]:
    """Three evaluations, 20 steps between them, and what the teacher moved in each stretch."""
    first = [step(n, kl_teacher_plain=moved[0]) for n in range(1, 21)]
    second = [step(n, kl_teacher_plain=moved[1]) for n in range(21, 41)]
    return [evaluation(0, kls[0]), *first, evaluation(20, kls[1]), *second, evaluation(40, kls[2])]


def test_a_healthy_run_has_no_warnings():
    rows = [step(n, kl_teacher_plain=0.01, share_ended=0.8 + 0.01 * (n % 10)) for n in range(1, 60)]
    assert codes(rows) == []
    assert codes([]) == []


def test_a_teacher_that_runs_after_its_student_is_found():
    assert codes(colluding((0.738, 0.684, 0.736), (0.03, 0.28))) == ["PK303"]


@pytest.mark.parametrize(
    ("kls", "moved"),
    [
        ((0.81, 0.74, 0.68), (0.03, 0.28)),  # the student comes nearer all the same
        ((0.738, 0.684, 0.736), (0.03, 0.031)),  # the teacher hasn't moved on
        ((0.738, 0.684, 0.736), (0.001, 0.008)),  # it has, but hardly
    ],
)
def test_a_teacher_that_moves_with_its_student_is_not_blamed(kls, moved):
    assert codes(colluding(kls, moved)) == []


def test_responses_that_stop_ending_are_found():
    shares = [0.96] * 20 + [0.85] * 10 + [0.7] * 10 + [0.6] * 10
    rows = [step(n, share_ended=share) for n, share in enumerate(shares, 1)]
    assert codes(rows) == ["PK302"]
    assert codes(rows[:30]) == []


def test_they_are_found_where_half_of_the_text_is_references():
    shares = [0.96] * 20 + [0.7] * 20
    assert codes([step(n, student_share=0.5, share_ended=s) for n, s in enumerate(shares, 1)]) == [
        "PK302"
    ]


def test_endings_of_the_references_are_not_the_students():
    rows = [step(n, student_share=0.0, share_ended=1.0 - n / 60) for n in range(1, 50)]
    assert codes(rows) == []


def test_nothing_moves_is_found_in_student_and_teacher():
    assert codes([step(n, gradient_norm_student=0.0) for n in range(1, 11)]) == ["PK304"]
    assert codes([step(n, gradient_norm_student=0.0) for n in range(1, 10)]) == []
    assert codes([step(n, kl_teacher_plain=1e-7) for n in range(1, 21)]) == ["PK305"]


def test_a_loss_that_leaves_all_before_is_found():
    assert codes([step(1), step(2, loss=60.0)]) == ["PK306"]
    assert codes([step(1), step(2, loss=10.0)]) == []
    assert codes([step(1, loss=0.01), step(2, loss=0.5)]) == []
    assert codes([step(1, loss=60.0), step(2)]) == []


def test_a_finding_is_said_once_and_not_again_after_a_resume():
    rows = [step(n, num_empty=16) for n in range(1, 4)]
    watch = Watch()
    said = [str(finding) for row in rows for finding in watch.add(row)]
    assert len(said) == 1
    assert said[0].startswith("warning: step 1: all 16 responses of the student are empty")
    assert said[0].endswith("(PK301)")
    assert Watch(rows).add(step(4, num_empty=16)) == []


def test_every_code_is_used_once_documented_and_unique():
    known = [check.code for check in CHECKS]
    source = "".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "findings.py")
    assert sorted(set(known)) == known
    assert set(re.findall(r'"(PK\d{3})"', source)) == set(known)


def test_a_forecast_adds_up_steps_evaluations_and_saving():
    measured = Measured(
        seconds_start=10,
        seconds_step=2,
        seconds_evaluation=30,
        seconds_checkpoint=4,
        bytes_checkpoint=1000,
        bytes_student=250,
        seconds_loading=7,
    )
    schedule = Schedule(max_steps=100, evaluation_every=40, checkpoint_every=50, checkpoints_kept=1)
    expected = forecast(measured, schedule)

    assert expected.seconds_steps == 10 + 99 * 2
    assert expected.seconds_evaluations == (1 + 3) * 30  # before, after 40, 80 and 100
    assert expected.seconds_saving == 2 * 4 + 3 * 0.25 * 4
    assert expected.seconds == 7 + 208 + 120 + 11
    assert expected.bytes_disk == 2 * 1000 + 2 * 250


def test_the_forecast_of_a_rehearsal_is_of_the_order_of_what_the_run_takes(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl", 12)
    tiny.write_data(tmp_path / "valid.jsonl", 8)
    raw = tiny.recipe(tmp_path, optimization={"max_steps": 12}, evaluation={"every_steps": 6})
    raw["data"] |= {"validation": str(tmp_path / "valid.jsonl")}
    recipe, method = recipe_from_dict(raw), build_method("promptkd")
    expected = Trainer(recipe, method).rehearse()["forecast"]
    started = time.perf_counter()
    trainer = Trainer(recipe, method)
    trainer.run()
    took = time.perf_counter() - started
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert took / 5 < said["seconds_forecast"] < 5 * took
    assert said["seconds_taken"] <= took
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.pt"))

    assert took / 5 < expected["seconds"] < 5 * took
    assert written / 2 < expected["bytes_disk"] < 3 * written
