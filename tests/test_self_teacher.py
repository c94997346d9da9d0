"""The student as its own teacher: opsd, sdft and opcd against a derivation, and what equals what.

The derivation uses float64, whole logits and one sequence at a time; responses are greedy, so that
it can write them too.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from promptkd import api
from promptkd.divergences import generalized_jsd, kl
from promptkd.errors import UserError
from promptkd.evaluation.exposure_bias import exposure_bias
from promptkd.methods import gkd, opcd
from test_context import (
    BATCH,
    RATES,
    STEPS,
    TEMPLATE,
    gradient_step,
    logprobs_of,
    metrics,
    recipe,
    relative_error,
    sequences,
    write_rows,
)

DECAY = 0.7  # so that the average moves within three steps
TELLS = {"context": "hint", "context_template": TEMPLATE}
LORA = {"r": 2, "alpha": 8}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    write_rows(directory / "train.jsonl")
    return directory


def run(pair, output, method, teacher, **overrides):
    lora, rows = overrides.pop("lora", None), overrides.pop("validation", None)
    overrides["student"] = {"model": str(pair / "student"), "lora": lora}
    overrides["sampling"] = {"temperature": 0}
    overrides["data"] = {"validation": str(rows)} if rows else {"columns": {"ignore": ["hint"]}}
    overrides["data"] = {} if "context" in teacher and not rows else overrides["data"]
    api.train(recipe(pair, output, method, teacher=teacher, **overrides))
    return [row["loss"] for row in metrics(output)]


@torch.no_grad()
def written_by(student, request, limit=24):
    tokens = request
    while len(tokens) < len(request) + limit:
        chosen = logprobs_of(student, torch.cat([tokens, tokens[-1:]]), len(tokens))[-1].argmax()
        tokens = torch.cat([tokens, chosen[None]])
        if chosen == tiny.EOS:
            break
    return tokens[len(request) :]


def derive(rows, loss_of, follow, teacher=None):
    """The student after three steps, its average, and the losses."""
    student = tiny.model("llama", seed=1).double()
    average = copy.deepcopy(student)
    fixed = teacher or copy.deepcopy(student)
    losses = []
    for step in range(STEPS):
        batch = []
        for tokens, start, told, begin in sequences(rows, step):
            response = written_by(student, tokens[:start])
            own, read = (torch.cat([t[:n], response]) for t, n in ((tokens, start), (told, begin)))
            batch.append((own, start, read, begin))
        count = sum(len(tokens) - start for tokens, start, _, _ in batch)
        who = {"frozen": fixed, "ema": average, "live": copy.deepcopy(student)}[follow]
        loss = 0.0
        for tokens, start, told, begin in batch:
            p = logprobs_of(who, told, begin).detach()
            loss = loss + loss_of(logprobs_of(student, tokens, start), p).sum() / count
        gradient_step(loss, list(student.parameters()), RATES["student"])
        with torch.no_grad():
            for slow, now in zip(average.parameters(), student.parameters(), strict=True):
                slow.copy_(DECAY * slow + (1 - DECAY) * now)
        losses.append(loss.item())
    return student, average, losses


@pytest.mark.parametrize(
    ("method", "follow", "loss_of"),
    [
        ("opsd", "frozen", generalized_jsd),
        ("sdft", "ema", kl),
        ("sdft", "live", kl),
        ("opcd", None, kl),
    ],
)
def test_three_steps_equal_the_derivation(pair, tmp_path, method, follow, loss_of):
    rows = [json.loads(line) for line in (pair / "train.jsonl").read_text().splitlines()]
    who, other = {"model": "student", "follow": follow, "ema_decay": DECAY}, None
    if follow is None:
        who, other = {}, tiny.model("llama", num_layers=3, seed=2).double()
    student, average, expected = derive(rows, loss_of, follow or "frozen", other)
    losses = run(pair, tmp_path / "run", {"name": method}, who | TELLS)
    assert losses == pytest.approx(expected, rel=1e-4)
    start = dict(tiny.model("llama", seed=1).named_parameters())
    saved = {"student": student} | ({"teacher": average} if follow == "ema" else {})
    for name, model in saved.items():
        trained = load_file(tmp_path / f"run/{name}/model.safetensors")
        for key, parameter in model.named_parameters():
            assert relative_error(trained[key], parameter, start[key]) < 1e-3, (name, key)
    assert (tmp_path / "run/teacher").exists() == (follow == "ema")


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("method", ["sdft", "promptkd"])
def test_the_student_as_it_started_is_the_model_it_was_loaded_from(pair, tmp_path, method, lora):
    """Also where a LoRA student shares its weights with it, and a soft prompt learns before it."""
    losses = [
        run(pair, tmp_path / name, {"name": method}, {"model": model} | TELLS, lora=lora)
        for name, model in (("self", "student"), ("named", str(pair / "student")))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("method", ["sdft", "promptkd"])
def test_an_average_that_forgets_at_once_is_the_student_as_it_is(pair, tmp_path, method, lora):
    losses = [
        run(
            pair,
            tmp_path / follow,
            {"name": method},
            {"model": "student", "follow": follow, "ema_decay": 0.0} | TELLS,
            lora=lora,
        )
        for follow in ("ema", "live", "frozen")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def test_a_lora_student_shares_its_weights_with_itself_as_it_started(pair, tmp_path):
    from promptkd.config import recipe_from_dict
    from promptkd.methods import build_method
    from promptkd.training.trainer import Trainer

    raw = recipe(pair, tmp_path / "run", {"name": "sdft"}, teacher={"model": "student"} | TELLS)
    raw = raw.to_dict() | {"student": {"model": str(pair / "student"), "lora": LORA}}
    parts = Trainer(recipe_from_dict(raw), build_method("sdft")).parts
    held = {value.data_ptr() for value in parts.models.student.module.parameters()}
    assert parts.models.plain_teacher is not None
    teacher = dict(parts.models.plain_teacher.module.named_parameters())
    assert {value.data_ptr() for value in teacher.values()} < held
    assert not any("lora" in name for name in teacher)


def test_the_average_goes_on_from_its_checkpoint(pair, tmp_path):
    who = {"model": "student", "follow": "ema", "ema_decay": DECAY} | TELLS
    for steps in (2, 4):
        cut = run(pair, tmp_path / "cut", {"name": "sdft"}, who, optimization={"max_steps": steps})
    whole = run(pair, tmp_path / "whole", {"name": "sdft"}, who, optimization={"max_steps": 4})
    assert cut == whole
    for name in ("student", "teacher"):
        first, second = (
            load_file(tmp_path / run_ / name / "model.safetensors") for run_ in ("cut", "whole")
        )
        assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("follow", ["frozen", "ema", "live"])
def test_a_finished_run_is_measured_against_the_teacher_it_ended_with(pair, tmp_path, follow):
    who = {"model": "student", "follow": follow, "ema_decay": DECAY} | TELLS
    rows = pair / "train.jsonl"
    run(pair, tmp_path / "run", {"name": "sdft"}, who, validation=rows)
    name = exposure_bias(tmp_path / "run", num_examples=3, seeds=(1,))["teacher"]
    ends = {"frozen": pair / "student", "ema": tmp_path / "run/teacher"}
    assert name == str(ends.get(follow, tmp_path / "run/student"))


@pytest.mark.parametrize(
    ("method", "teacher", "says"),
    [
        ("gkd", {"model": "student"}, "is the student itself and reads the same"),
        ("opcd", {"model": "student"}, "the teacher reads nothing more"),
        ("gkd", {"follow": "ema"}, "only model: student moves"),
        ("seqkd", {"model": "student", "follow": "live"} | TELLS, "changes it in every step"),
    ],
)
def test_a_teacher_that_teaches_nothing_is_refused(pair, tmp_path, method, teacher, says):
    with pytest.raises(UserError, match=says):
        run(pair, tmp_path / "run", {"name": method}, teacher)


def test_opcd_is_gkd_over_a_teacher_that_must_know_more():
    assert opcd().terms == gkd().terms
    assert (opcd().needs_context, gkd().needs_context) == (True, False)


# -- lengths that grow


@pytest.mark.parametrize("method", ["gkd", "kd", "seqkd"])
def test_responses_grow_with_their_schedule_whoever_writes(pair, tmp_path, method, monkeypatch):
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    data = {"columns": {"ignore": ["hint"]}, "max_response_tokens": {"start": 2, "end": 6}}
    raw = recipe(pair, tmp_path / "run", {"name": method}, teacher={"system": None}, data=data)
    assert raw.data.longest_response == 6
    api.train(raw)
    longest = [row["num_tokens"] / BATCH for row in metrics(tmp_path / "run")]
    assert longest[0] <= 2 < longest[1] <= 4 < longest[2] <= 6


@pytest.mark.parametrize("value", [0, "many", {"start": 0, "end": 4}, {"start": 4}])
def test_a_length_that_is_none_is_refused_in_a_sentence(pair, tmp_path, value):
    with pytest.raises(UserError, match=r"'data.max_response_tokens'.*\{start: 64, end: 256\}"):
        recipe(pair, tmp_path / "run", {"name": "gkd"}, data={"max_response_tokens": value})
