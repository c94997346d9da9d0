"""What can't work ends in one clear sentence on stderr and exit status 1; nothing is lost."""

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import runs
import tiny
from promptkd.cli import main
from promptkd.config import Tracker, recipe_from_dict
from promptkd.errors import UserError
from promptkd.methods import build_method
from promptkd.training.checkpoints import load_latest, saved_checkpoints
from promptkd.training.trainer import Trainer


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 4)
    return directory


@pytest.fixture
def refusal(pair, tmp_path, capfd):
    """Train with a changed recipe; returns the sentence, after checking that nothing was begun."""

    def train(**overrides: Any) -> str:
        raw = tiny.recipe(pair, output=str(tmp_path / "run"))
        for key, value in overrides.items():
            if isinstance(value, dict) and key != "method":
                raw[key] = raw.get(key, {}) | value
            else:
                raw[key] = value
        raw = {key: value for key, value in raw.items() if value is not None}
        path = runs.write_recipe(tmp_path, raw)
        before = runs.everything(tmp_path)
        with pytest.raises(SystemExit) as end:
            main(["train", path])
        assert end.value.code == 1
        assert runs.everything(tmp_path) == before
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        sentence = stderr.rpartition("promptkd: ")[2]
        assert sentence.endswith(("\n", "."))
        return sentence.strip()

    return train


@pytest.mark.parametrize("other", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}], ids=str)
def test_an_estimate_from_sampled_tokens_under_another_law(refusal, other):
    sentence = refusal(method={"name": "opd"}, sampling=other)
    assert "have to come from the student's own law" in sentence
    assert "(PK111)" in sentence


def test_a_missing_data_file(refusal):
    assert "none.jsonl does not exist" in refusal(data={"train": "/nowhere/none.jsonl"})


def test_an_empty_data_file(refusal, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    sentence = refusal(data={"train": str(tmp_path / "empty.jsonl")})
    assert "empty.jsonl holds no rows" in sentence


def test_a_broken_line(refusal, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"request": "a"}\n{"request": \n')
    sentence = refusal(data={"train": str(tmp_path / "d.jsonl")})
    assert "d.jsonl:2: broken JSON" in sentence


def test_rows_without_a_request(refusal, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"query": "a"}\n')
    sentence = refusal(data={"train": str(tmp_path / "d.jsonl")})
    assert "d.jsonl:1: no request found in the columns ['query']" in sentence


@pytest.mark.parametrize("method", ["sft", "kd", "promptkd"])
def test_a_method_that_needs_references_on_data_without(refusal, tmp_path, method):
    tiny.write_data(tmp_path / "d.jsonl", with_output=False)
    options = {"rollouts": "reference"} if method == "promptkd" else {}
    sentence = refusal(method={"name": method} | options, data={"train": str(tmp_path / "d.jsonl")})
    assert sentence.startswith(f"The method '{method}' learns from reference responses, but ")
    assert "d.jsonl:1 has none" in sentence


def test_a_metric_that_needs_references_on_data_without(refusal, tmp_path):
    tiny.write_data(tmp_path / "v.jsonl", with_output=False)
    sentence = refusal(data={"validation": str(tmp_path / "v.jsonl")})
    assert sentence.startswith("evaluation.metric rouge_l compares with references")


def test_a_method_that_needs_a_teacher_without_one(refusal):
    assert "'promptkd' needs a teacher, but the recipe names none" in refusal(teacher=None)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_is_not_one(refusal, tmp_path, who):
    (tmp_path / "empty").mkdir()
    for model, complaint in (
        (str(tmp_path / "none"), "is not a model: it has no config.json"),
        (str(tmp_path / "empty"), "is not a model: it has no config.json"),
        (str(tmp_path / "none.gguf"), "none.gguf does not exist"),
        ("nobody/nothing", "nobody/nothing is not a model that can be loaded"),
    ):
        assert complaint in refusal(**{who: {"model": model}})


def test_a_model_whose_weights_are_damaged(refusal, tmp_path, pair):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (pair / "student").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    sentence = refusal(student={"model": str(broken)})
    assert "broken is not a model that can be loaded" in sentence


def test_different_tokenizers(refusal, tmp_path):
    tokens = ["<eos>", "<pad>", *map(chr, range(126, 31, -1)), "\n"]
    other = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=" "))
    other.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    other.decoder = decoders.Fuse()
    tiny.model("llama").save_pretrained(tmp_path / "teacher")
    PreTrainedTokenizerFast(
        tokenizer_object=other, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "teacher")

    sentence = refusal(teacher={"model": str(tmp_path / "teacher")})
    assert "token 2 is ' ' for the student and '~' for the teacher" in sentence
    assert "'seqkd'" in sentence


def test_a_soft_prompt_without_vectors(refusal):
    assert "length is 0" in refusal(method={"name": "promptkd", "length": 0})


def test_a_soft_prompt_longer_than_the_context(refusal):
    sentence = refusal(method={"name": "promptkd", "length": tiny.CONTEXT})
    assert str(tiny.CONTEXT) in sentence
    assert "context" in sentence


def test_a_soft_prompt_that_leaves_no_room_for_request_and_response(refusal):
    half = tiny.CONTEXT // 2
    sentence = refusal(data={"max_request_tokens": half, "max_response_tokens": half})
    assert f"max_request_tokens {half} + max_response_tokens {half}" in sentence
    assert f"= {2 * half + 7} positions, but the context of the teacher" in sentence


def test_requests_longer_than_the_context(refusal):
    sentence = refusal(data={"max_request_tokens": tiny.CONTEXT})
    assert f"max_request_tokens {tiny.CONTEXT} + max_response_tokens 24 = " in sentence


def test_an_unknown_recipe_key(refusal):
    assert "unknown key 'seeed'; did you mean 'seed'?" in refusal(seeed=1)


def test_an_unknown_tracker(refusal):
    assert "tensorbord" in refusal(tracking=["tensorbord"])


def test_a_tracker_that_is_not_installed(refusal):
    absent = next(name for name in get_args(Tracker) if importlib.util.find_spec(name) is None)
    assert f"tracking asks for {absent}, which is not installed" in refusal(tracking=[absent])


def test_an_output_that_is_not_a_run(refusal, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "exists and is not a run of promptkd" in refusal()


def test_an_output_that_is_a_file(refusal, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert f"{tmp_path}/run" in refusal()


def test_an_output_of_a_different_recipe(refusal, pair, tmp_path, capfd):
    raw = tiny.recipe(pair, method={"name": "sft"}, output=str(tmp_path / "run"))
    main_in_process(tmp_path, raw)
    sentence = refusal(method={"name": "sft"}, seed=1, optimization={"learning_rate": 0.5})
    assert "belongs to a run of a different recipe" in sentence
    assert "seed 0 -> 1" in sentence
    assert "optimization.learning_rate 0.01 -> 0.5" in sentence


def main_in_process(directory: Path, raw: dict[str, Any]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", runs.write_recipe(directory, raw)])
    assert end.value.code == 0


# -- trouble on the way: training stops, the last checkpoint is good, the same command goes on


def recipe(pair: Path, **overrides: Any) -> dict[str, Any]:
    raw = tiny.recipe(pair, method={"name": "sft"}, checkpoints={"every_steps": 2})
    raw["optimization"] |= {"max_steps": 4}
    raw["data"] |= {"max_response_tokens": 8}
    return raw | overrides


def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_changes_nothing(pair, tmp_path):
    raw = recipe(pair, method={"name": "promptkd"}) | {"output": str(tmp_path / "run")}
    path = runs.write_recipe(tmp_path, raw)
    assert runs.run(["train", path], tmp_path / "whole").status == 0
    expected = runs.result(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    newest = saved_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    weights = bytearray((newest / "student.pt").read_bytes())
    weights[len(weights) // 2] ^= 0xFF
    (newest / "student.pt").write_bytes(bytes(weights))
    outcome = runs.run(["train", path], tmp_path / "again")

    assert outcome.status == 0, outcome.stderr
    assert f"{newest} is damaged (student.pt is not as it was written)" in outcome.stdout
    assert f"resuming {tmp_path / 'run'} after step 2" in outcome.stdout
    assert runs.result(tmp_path / "run") == expected


@pytest.fixture(scope="module")
def validated(pair, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe that writes students and checkpoints, and the result of its uninterrupted run."""
    place = tmp_path_factory.mktemp("validated")
    raw = recipe(pair, evaluation={"every_steps": 1, "metric": "cross_entropy"})
    raw["data"] |= {"validation": str(pair / "valid.jsonl")}
    path = runs.write_recipe(place, raw | {"output": str(place / "run")})
    assert runs.run(["train", path], place / "out").status == 0
    return raw, runs.result(place / "run")


@pytest.mark.parametrize(
    ("largest_file", "complaint"),
    [
        (120_000, "No space left while writing the checkpoint of step 2"),
        (60_000, "No space left while writing the student"),
        (1_500, "No space left while writing the environment.json"),
    ],
)
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_space(
    validated, tmp_path, largest_file, complaint
):
    raw, expected = validated
    path = runs.write_recipe(tmp_path, raw | {"output": str(tmp_path / "run")})
    outcome = runs.run(["train", path], tmp_path / "full", largest_file=largest_file)

    assert outcome.status == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert f"promptkd: {complaint}" in outcome.stderr
    outcome = runs.run(["train", path], tmp_path / "again")
    assert outcome.status == 0, outcome.stderr
    assert runs.result(tmp_path / "run") == expected


def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint(validated, tmp_path):
    raw, expected = validated
    path = runs.write_recipe(tmp_path, raw | {"output": str(tmp_path / "run")})
    in_step_4 = runs.Moment("open", ".writing-step-000004")
    assert runs.run(["train", path], tmp_path / "killed", dies_at=in_step_4).status == -9
    outcome = runs.run(["train", path], tmp_path / "full", largest_file=120_000)

    assert outcome.status == 1, outcome.stderr
    assert "No space left while writing the checkpoint of step 4" in outcome.stderr
    saved, complaints = load_latest(tmp_path / "run" / "checkpoints")
    assert (saved.step, complaints) == (2, [])
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert runs.run(["train", path], tmp_path / "again").status == 0
    assert runs.result(tmp_path / "run") == expected


def test_a_loss_that_is_not_finite_stops_with_its_step_and_examples(pair, tmp_path):
    raw = recipe(pair, output=str(tmp_path / "run"))
    raw["optimization"] |= {"global_batch_size": 12}
    made = recipe_from_dict(raw)
    trainer = Trainer(made, build_method(made.method.name, **made.method.options))
    letter = tiny.tokenizer()("7", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        trainer.parts.models.student.module.get_input_embeddings().weight[letter] = torch.nan
    with pytest.raises(
        UserError, match=r"'student' is not finite at step 1, on the training examples \[7\]"
    ):
        trainer.run()


@pytest.mark.parametrize("name", ["sft", "promptkd"])
def test_a_learning_rate_that_explodes_stops_and_keeps_the_last_checkpoint(pair, tmp_path, name):
    raw = recipe(pair, method={"name": name}, output=str(tmp_path / "run"))
    raw["checkpoints"]["every_steps"] = 1
    raw["optimization"] |= {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 1e30}
    outcome = runs.run(["train", runs.write_recipe(tmp_path, raw)], tmp_path / "out")

    assert outcome.status == 1, outcome.stdout
    assert "Traceback" not in outcome.stderr
    assert "at step 2" in outcome.stderr
    saved, complaints = load_latest(tmp_path / "run" / "checkpoints")
    assert (saved.step, complaints) == (1, [])
    assert all(torch.isfinite(t).all() for t in saved.tensors["student"].values())
    assert [row["step"] for row in runs.json_lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_student_that_writes_nothing_is_reported_with_its_count_and_trained(pair, tmp_path):
    silent = tiny.model("gpt2", seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        silent.transformer.ln_f.weight.zero_()
        silent.transformer.ln_f.bias.fill_(1.0)
        silent.lm_head.weight.zero_()
        silent.lm_head.weight[tiny.EOS] = 1.0
    silent.save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    raw = recipe(pair, method={"name": "promptkd"}, output=str(tmp_path / "run"))
    raw["student"] = {"model": str(tmp_path / "student")}
    raw["data"] |= {"validation": str(pair / "valid.jsonl")}
    outcome = runs.run(["train", runs.write_recipe(tmp_path, raw)], tmp_path / "out")

    assert outcome.status == 0, outcome.stderr
    assert "warning: step 1: all 4 responses of the student are empty" in outcome.stdout
    rows = runs.json_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["evaluation"]["rouge_l"] == 0
    assert (rows[1]["num_empty"], rows[1]["response_length"]) == (4, 1.0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
