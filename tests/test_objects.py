"""Models and rows that come as objects: what a run makes of them, records of them, leaves them."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import promptkd as pk
import runs
import tiny
from promptkd.data import read_examples
from promptkd.errors import UserError
from promptkd.given import Given, is_lost, same
from promptkd.models.loading import dtype_of, load_model, load_tokenizer
from promptkd.models.objects import given_model
from promptkd.objects import complete, lora_keys

ROWS = [{"instruction": f"say {i}" + "?" * (i % 5), "output": f"it is {i}!"} for i in range(12)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A saved pair and its data, with nothing trained."""
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    path = directory / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return directory


def objects(pair: Path) -> dict[str, Any]:
    loaded = {
        who: AutoModelForCausalLM.from_pretrained(pair / who) for who in ("student", "teacher")
    }
    return {**loaded, "tokenizer": tiny.tokenizer(), "train": copy.deepcopy(ROWS)}


def nameless(pair: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """A recipe that leaves models and rows to the call."""
    raw = tiny.recipe(pair, output=str(output), **overrides)
    del raw["student"]["model"], raw["teacher"]["model"], raw["data"]["train"]
    return raw


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """What a run of objects returns, the objects, and their weights before."""
    given = objects(pair)
    before = {who: state_of(given[who]) for who in ("student", "teacher")}
    output = tmp_path_factory.mktemp("objects") / "run"
    run = pk.train(nameless(pair, output), **given, validation=ROWS[:4])
    return run, given, before


def test_a_run_of_objects_is_the_run_of_their_files(trained, pair, tmp_path):
    raw = tiny.recipe(pair, output=str(tmp_path / "run"))
    raw["data"]["validation"] = raw["data"]["train"]
    raw["evaluation"] = {"num_examples": 4}
    named, run = runs.train(raw), trained[0]
    own, other = (load_file(place / "student" / "model.safetensors") for place in (run.path, named))
    assert own.keys() == other.keys()
    for name, weight in own.items():  # what lies elsewhere in memory is summed in another order
        torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=1e-5)
    losses = [
        [row["loss"] for row in runs.json_lines(place / "metrics.jsonl") if "loss" in row]
        for place in (run.path, named)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_leaves_objects_as_they_were(trained):
    _, given, before = trained
    for who, weights in before.items():
        model = given[who]
        assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
        assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
        assert model.config._attn_implementation == "sdpa"
        assert not any("forward" in vars(part) for part in model.modules())
    assert given["tokenizer"].chat_template is None
    assert given["train"] == ROWS


def test_the_record_says_that_objects_came_and_holds_their_digests(trained):
    run, given, _ = trained
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    place = given["student"].name_or_path
    assert recipe["student"]["model"] == f"object:LlamaForCausalLM of {place}"
    assert recipe["data"]["train"] == ["object:12 rows (list)"]
    contents = json.loads((run.path / "environment.json").read_text())["contents"]
    assert {"training requests", "validation requests", "validation references"} < {*contents}
    for who in ("student", "teacher"):
        assert {f"{who} {what}" for what in ("weights", "config", "tokenizer")} < {*contents}
    card = (run.path / "student" / "README.md").read_text()
    assert place not in card
    assert "object" not in card.partition("## Recipe")[0].partition("---")[2].partition("---")[0]


def test_the_same_call_finds_a_finished_run_and_the_file_alone_is_refused(trained, pair):
    run, given, _ = trained
    again = pk.train(nameless(pair, run.path), **given, validation=ROWS[:4])
    assert again.scores == run.scores
    recipe = pk.load_recipe(run.path / "recipe.yaml", [f"output={run.path}-again"])
    with pytest.raises(UserError, match=r"object:LlamaForCausalLM.*Give it again"):
        pk.check(recipe, train=ROWS, validation=ROWS[:4])


def test_a_run_goes_on_with_the_same_objects_and_refuses_others(pair, tmp_path):
    given, raw = objects(pair), nameless(pair, tmp_path / "run", method={"name": "gkd"})
    raw["optimization"]["max_steps"] = 1
    pk.train(raw, **given)
    raw["optimization"]["max_steps"] = 2
    other = [*ROWS[:-1], {"instruction": "another", "output": "row"}]
    with pytest.raises(UserError, match="began with other training requests"):
        pk.train(raw, **{**given, "train": other})
    changed = copy.deepcopy(given["student"])
    with torch.no_grad():
        changed.lm_head.weight.add_(1.0)
    with pytest.raises(UserError, match="began with other student weights"):
        pk.train(raw, **{**given, "student": changed})
    run = pk.train(raw, **given)
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2]


def test_a_recipe_file_and_a_method_by_name_take_objects_too(pair, tmp_path):
    raw = tiny.recipe(pair, output=str(tmp_path / "run"))
    file = runs.write_recipe(tmp_path, raw)
    recipe = complete(file, {"train": datasets.Dataset.from_list(ROWS)}, "gkd")
    assert recipe.student.model == raw["student"]["model"]
    assert recipe.method.name == "gkd"
    assert recipe.data.train == ("object:12 rows (Dataset)",)
    assert [e.instruction for e in read_examples(recipe.data.train)] == [
        row["instruction"] for row in ROWS
    ]
    again = complete(recipe, {"validation": ROWS[:2]})
    assert len(read_examples(again.data.train)) == 12


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_bad_row_is_refused_by_its_number_and_the_argument(pair, tmp_path, part):
    rows = [*ROWS[:2], {"instruction": "", "output": "it"}]
    data = {"train": ROWS, part: rows}
    with pytest.raises(UserError, match=f"^row 3 of {part}: 'instruction' is ''"):
        pk.check(tiny.recipe(pair, output=str(tmp_path / "run")), **data)
    with pytest.raises(UserError, match=f"^row 2 of {part} is 5"):
        pk.check(tiny.recipe(pair, output=str(tmp_path / "run")), **{**data, part: [ROWS[0], 5]})


def test_columns_are_read_from_rows_as_from_files(pair, tmp_path):
    rows = [{"q": row["instruction"], "a": row["output"]} for row in ROWS]
    columns = {"columns": {"request": "q", "response": "a"}}
    found = pk.check(tiny.recipe(pair, output=str(tmp_path / "run"), data=columns), train=rows)
    assert found["example"]["request"] == "say 0"


def test_a_teacher_object_is_not_held_twice_where_the_precision_is_its_own(pair):
    model = AutoModelForCausalLM.from_pretrained(pair / "teacher")
    given = given_model(model, tiny.tokenizer(), "teacher")
    copied = load_model(given, torch.float32)
    whole = dict(copied.named_parameters())
    assert all(whole[name].data_ptr() == own.data_ptr() for name, own in model.named_parameters())
    rounded = load_model(given, torch.bfloat16)
    assert dtype_of(given) == torch.float32
    assert {weight.dtype for weight in rounded.parameters()} == {torch.bfloat16}
    assert load_tokenizer(given) is not given.tokenizer


def test_tied_weights_stay_tied_in_the_copy():
    model = tiny.model("gpt2", tie_word_embeddings=True)
    given = given_model(model, tiny.tokenizer(), "student")
    copied = load_model(given, torch.float32)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight


def test_a_peft_model_is_read_merged_and_stays_as_it_was(pair):
    base = AutoModelForCausalLM.from_pretrained(pair / "teacher")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
    tokens = torch.arange(10, 20)[None]
    expected = adapted(tokens).logits
    given = given_model(adapted, tiny.tokenizer(), "teacher")
    assert given.startswith("object:LlamaForCausalLM of ")
    torch.testing.assert_close(load_model(given, torch.float32)(tokens).logits, expected)
    assert any("lora_" in name for name, _ in adapted.named_parameters())
    with pytest.raises(UserError, match="adapters inside"):
        given_model(adapted.get_base_model(), tiny.tokenizer(), "teacher")


def test_what_is_no_whole_causal_model_is_refused(pair):
    trunk = tiny.model("llama").model
    with pytest.raises(UserError, match="student is a LlamaModel, not a causal language model"):
        given_model(trunk, tiny.tokenizer(), "student")
    with pytest.raises(UserError, match="student is a dict"):
        given_model({"a": 1}, tiny.tokenizer(), "student")
    with pytest.raises(UserError, match=r"tokenizer=\.\.\."):
        given_model(tiny.model("llama"), None, "student")
    with pytest.raises(UserError, match="spread over meta"):
        given_model(tiny.model("llama").to("meta"), tiny.tokenizer(), "student")
    assert given_model(AutoModelForCausalLM.from_pretrained(pair / "student"), None, "s").tokenizer
    broken = tiny.model("llama")
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"lm_head.weight holds NaN"):
        load_model(given_model(broken, tiny.tokenizer(), "student"), torch.float32)


def test_two_models_of_one_kind_are_two():
    one, other = (given_model(tiny.model("llama"), tiny.tokenizer(), "x") for _ in range(2))
    assert one == other
    assert not same(one, other)
    assert same(one, one)
    assert type(copy.deepcopy(one)) is str
    assert is_lost(copy.deepcopy(one))
    assert not isinstance(copy.copy(one), Given)


def test_a_peft_config_is_the_recipes_lora():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"])
    assert lora_keys(config) == {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(UserError, match=r"sets use_rslora, use_dora, which student\.lora"):
        lora_keys(peft.LoraConfig(use_rslora=True, use_dora=True))
    with pytest.raises(UserError, match=r"lora_dropout is 0\.1\. Nothing is dropped here"):
        lora_keys(peft.LoraConfig(lora_dropout=0.1))
    with pytest.raises(UserError, match="is a PromptTuningConfig"):
        lora_keys(peft.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(UserError, match="list the layers"):
        lora_keys(peft.LoraConfig(target_modules=".*_proj"))
    assert lora_keys(peft.LoraConfig(target_modules="all-linear"))["target_modules"] == "all-linear"


def test_an_objects_adapters_are_merged_into_what_is_saved(pair, tmp_path):
    given, raw = objects(pair), nameless(pair, tmp_path / "run", method={"name": "kd"})
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    run = pk.train(raw, **given, peft_config=config)
    student = AutoModelForCausalLM.from_pretrained(run.student)
    own, start = student.state_dict(), given["student"].state_dict()
    changed = {name for name in start if not torch.equal(own[name], start[name])}
    assert changed
    assert all("q_proj" in name for name in changed)
    with pytest.raises(UserError, match=r"Set student\.lora\.merge"):
        pk.train({**raw, "student": {"lora": {"r": 2}}}, **given)


def test_all_linear_layers_but_the_output_layer_learn(pair, tmp_path):
    given, raw = objects(pair), nameless(pair, tmp_path / "run", method={"name": "kd"})
    run = pk.train(raw, **given, peft_config=peft.LoraConfig(r=2, target_modules="all-linear"))
    own = AutoModelForCausalLM.from_pretrained(run.student).state_dict()
    start = given["student"].state_dict()
    changed = {name for name in start if not torch.equal(own[name], start[name])}
    linear = {
        f"{name}.weight"
        for name, part in given["student"].named_modules()
        if isinstance(part, torch.nn.Linear) and name != "lm_head"
    }
    assert changed == linear
    assert "target_modules: all-linear" in (run.path / "recipe.yaml").read_text()


def test_a_finished_run_is_not_that_of_other_objects(trained, pair):
    run, given, _ = trained
    raw = nameless(pair, run.path)
    other = [*ROWS[:-1], {"instruction": "another", "output": "row"}]
    with pytest.raises(UserError, match="is finished, and it learnt from other training requests"):
        pk.train(raw, **{**given, "train": other}, validation=ROWS[:4])
    changed = copy.deepcopy(given["teacher"])
    with torch.no_grad():
        changed.lm_head.weight.add_(1.0)
    with pytest.raises(UserError, match="learnt from other teacher weights than are given now"):
        pk.train(raw, **{**given, "teacher": changed}, validation=ROWS[:4], allow_changes=True)


def test_an_argument_that_isnt_there_is_refused_with_the_one_that_was_meant(pair, tmp_path):
    with pytest.raises(UserError, match="no argument 'studnet'; did you mean 'student'"):
        pk.train(nameless(pair, tmp_path / "run"), studnet="x")  # pyright: ignore


def test_models_and_rows_are_evaluated_as_objects(trained, tmp_path):
    run, given, before = trained
    asked: dict[str, Any] = {"seeds": (10,), "max_response_tokens": 8, "template": "none"}
    asked |= {"max_request_tokens": 24, "precision": "fp32"}
    scored = pk.evaluate(run, ROWS[:3], **asked)
    assert scored["data"] == ["object:3 rows (list)"]
    assert scored["teacher"].startswith("object:")
    assert scored["scores"]["reverse_kl_to_teacher"]["mean"] > 0
    assert (run.path / "evaluation" / "data.json").is_file()
    named = pk.evaluate(
        given["student"],
        {"few": ROWS[:3]},
        tokenizer=given["tokenizer"],
        teacher=given["teacher"],
        output=tmp_path,
        **asked,
    )
    start = pk.evaluate_with(run, ["start"], {"few": ROWS[:3]}, **asked)["start"]
    assert named["few"]["scores"] == start["few"]["scores"]
    now = given["student"].state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before["student"].items())


def test_a_model_that_is_an_object_is_scored_without_a_place_for_it(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = trained[1]
    asked: dict[str, Any] = {"seeds": (10,), "num_examples": 2, "template": "none"}
    asked |= {"tokenizer": given["tokenizer"], "max_response_tokens": 8}
    scored = pk.evaluate(given["student"], ROWS[:3], **asked)
    assert [*tmp_path.iterdir()] == []
    assert repr(scored).startswith("2 examples, seeds [10]")
    assert scored.scores.rouge_l.mean == scored["scores"]["rouge_l"]["mean"]
    assert [row.request for row in scored.predictions] == ["say 0", "say 1?"]
    with pytest.raises(UserError, match="say where its scores go"):
        pk.evaluate(given["student"].name_or_path, ROWS)


def test_a_run_by_its_path_is_measured_without_the_teacher_that_came_as_an_object(trained, capsys):
    run, _, _ = trained
    scored = pk.evaluate(run.path, ROWS[:2], seeds=(10,), output=run.path / "without")
    assert "reverse_kl_to_teacher" not in scored["scores"]
    assert "no KL to the run's teacher" in capsys.readouterr().out
    assert [*pk.generate(run.path, "say 1")] == ["student"]
    assert [*pk.generate(run, "say 1")] == ["teacher", "adapted teacher", "student"]
    with pytest.raises(UserError, match="Give it again"):
        pk.exposure_bias(run.path, ROWS[:4])
    assert pk.exposure_bias(run, ROWS[:4], seeds=(1,))["num_examples"] == 4
    assert pk.prompt_analysis(run, num_examples=2)["num_examples"]["train"] == 2


class Planned(Exception):
    """The stages are written, and the first of them would run."""


def test_a_whole_path_writes_the_models_that_came_as_objects_for_its_stages(pair, tmp_path):
    given = objects(pair)

    def stop(sentence: str) -> None:
        if sentence.startswith("1/"):
            raise Planned

    asked = {"tokenizer": given["tokenizer"], "student": given["student"], "say": stop}
    with pytest.raises(Planned):
        pk.distill(given["teacher"], given["train"], tmp_path / "whole", **asked)
    place = tmp_path / "whole" / "given" / "teacher"
    written = AutoModelForCausalLM.from_pretrained(place).state_dict()
    own = given["teacher"].state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in written.items())
    stages = "".join(file.read_text() for file in (tmp_path / "whole" / "stages").iterdir())
    assert str(place) in stages
    assert "object:" not in stages
    with torch.no_grad():
        given["teacher"].lm_head.weight.add_(1.0)
    with pytest.raises(UserError, match=r"begun otherwise .*digest of the teacher"):
        pk.distill(given["teacher"], given["train"], tmp_path / "whole", **asked)
    with pytest.raises(UserError, match=r"^row 2 of held_out is 5"):
        pk.distill("x", given["train"], tmp_path / "other", held_out=[ROWS[0], 5], say=stop)
