"""``sampling.engine: auto``: who writes is chosen once, recorded, and kept when a run goes on."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

import runs
import tiny
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.evaluation.protocol import Protocol, Questions
from promptkd.generation.vllm_engine import VLLMEngine, expect_several
from promptkd.methods import build_method
from promptkd.training.engine import with_engine
from promptkd.training.planned import Cluster, plan_for
from promptkd.training.run_directory import RunDirectory
from test_sizing import SMOL, SMOL10


@pytest.fixture
def card(monkeypatch):
    """A machine with a card and vLLM, as far as the choice can tell."""
    found = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n == "vllm" or found(n))
    monkeypatch.setattr(VLLMEngine, "alone", True)
    return monkeypatch


def chosen(tmp_path, method="gkd", recorded=None, **changes):
    recipe = recipe_from_dict(tiny.recipe(tmp_path, **changes))
    return with_engine(recipe, build_method(method), recorded).sampling.engine


def test_without_a_card_transformers_writes(tmp_path):
    assert chosen(tmp_path) == "transformers"


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        *[(name, "vllm") for name in ("gkd", "promptkd", "distillm", "imitkd")],
        *[(name, "transformers") for name in ("sft", "kd", "seqkd", "minillm")],
    ],
)
def test_on_a_card_vllm_writes_what_the_student_writes_alone(card, tmp_path, method, engine):
    assert chosen(tmp_path, method) == engine


def test_where_vllm_would_be_refused_transformers_writes(card, tmp_path):
    assert chosen(tmp_path, sharding="fsdp") == "transformers"
    with pytest.raises(UserError, match=r"sharding: fsdp and sampling.engine: vllm"):
        chosen(tmp_path, sharding="fsdp", sampling={"engine": "vllm"})


def test_where_it_is_not_installed_or_not_alone_transformers_writes(card, tmp_path):
    expect_several()  # a study, distill, or an engine that was started before
    assert chosen(tmp_path) == "transformers"
    card.setattr(VLLMEngine, "alone", True)
    assert chosen(tmp_path) == "vllm"
    card.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen(tmp_path) == "transformers"


def test_what_is_asked_for_is_taken(card, tmp_path):
    assert chosen(tmp_path, sampling={"engine": "transformers"}) == "transformers"
    card.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(tmp_path, sampling={"engine": "vllm"}) == "vllm"


def test_a_run_goes_on_with_the_engine_it_began_with(card, tmp_path):
    for engine in ("transformers", "vllm"):
        assert chosen(tmp_path, recorded={"recipe": {"sampling": {"engine": engine}}}) == engine
    assert chosen(tmp_path, recorded={"recipe": {}}) == "transformers"  # an earlier version's
    card.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(tmp_path, recorded={"recipe": {"sampling": {"engine": "vllm"}}}) == "vllm"


def test_options_that_nobody_reads_are_refused_with_the_reason(tmp_path):
    own = {"sampling": {"vllm": {"seed": 1}}}
    with pytest.raises(UserError, match="transformers writes here, because there is no GPU"):
        chosen(tmp_path, **own)
    with pytest.raises(UserError, match="because the run began with it"):
        chosen(tmp_path, recorded={"recipe": {}}, **own)
    with pytest.raises(UserError, match="the engine is transformers: set engine: vllm"):
        chosen(tmp_path, sampling={"engine": "transformers", "vllm": {"seed": 1}})


def test_options_wait_for_the_card_that_reads_them(card, tmp_path):
    assert chosen(tmp_path, sampling={"vllm": {"seed": 1}}) == "vllm"


def test_the_choice_is_recorded_and_an_earlier_record_is_no_change(tmp_path, capsys):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl", 6)
    raw = tiny.recipe(tmp_path, optimization={"max_steps": 1})
    run = runs.train(raw)
    record = json.loads((run / "environment.json").read_text())
    assert record["identity"]["recipe"]["sampling"]["engine"] == record["engine"] == "transformers"
    assert "engine transformers" in capsys.readouterr().out
    assert "engine: auto" in (run / "recipe.yaml").read_text()

    method = build_method("promptkd")
    named = raw | {"sampling": {"engine": "transformers"}}
    for recipe in map(recipe_from_dict, (raw, named)):
        assert RunDirectory(recipe, method).finished
    del record["identity"]["recipe"]["sampling"]["engine"]
    (run / "environment.json").write_text(json.dumps(record))
    for recipe in map(recipe_from_dict, (raw, named)):
        assert RunDirectory(recipe, method).finished
    with pytest.raises(UserError, match=r"sampling.engine 'transformers' -> 'vllm'"):
        RunDirectory(recipe_from_dict(raw | {"sampling": {"engine": "vllm"}}), method)


def test_an_evaluation_chooses_once_and_for_what_is_recorded(card, tmp_path):
    tiny.write_data(tmp_path / "test.jsonl", 2)
    data = str(tmp_path / "test.jsonl")
    asked = Questions.of(data, Protocol.of(None, {}))
    assert asked.protocol.engine == "vllm"
    own = Questions.of(data, Protocol.of(None, {"engine": "transformers"}))
    assert own.protocol == replace(asked.protocol, engine="transformers")
    card.setattr(torch.cuda, "is_available", lambda: False)
    assert Questions.of(data, Protocol.of(None, {})).protocol == own.protocol


@pytest.mark.parametrize(
    ("method", "device", "share"),
    [("gkd", "cuda", 0.3), ("gkd", "cpu", None), ("kd", "cuda", None)],
)
def test_a_plan_for_cards_has_vllm_where_a_run_there_would(tmp_path, method, device, share):
    recipe = recipe_from_dict(tiny.recipe(tmp_path))
    plan = plan_for(recipe, build_method(method), (SMOL10, SMOL), Cluster(1, 80, device))
    assert plan.vllm_share == share
