"""What a run will take elsewhere: equations that give back what was counted and measured."""

import copy
import json
from pathlib import Path

import pytest
import torch

import runs
import tiny
from promptkd.config import recipe_from_dict
from promptkd.keys import override
from promptkd.methods import build_method
from promptkd.models.language_model import LanguageModel
from promptkd.models.sizes import num_parameters
from promptkd.training.planned import Cluster, plan_for, plan_lines, remedies
from promptkd.training.sizing import (
    EPYC,
    H100,
    Plan,
    Shape,
    fits,
    kept_per_token,
    peak_bytes,
    replace,
    standing_bytes,
    step_seconds,
    weak_scaling,
    writing_bytes,
)
from promptkd.training.token_budget import bytes_per_token

SMOL = Shape(30, 576, 1536, queries=576, keys=192, vocabulary=49152, tied=True)
SMOL10 = Shape(10, 576, 1536, queries=576, keys=192, vocabulary=49152, tied=True)
SMALL = Shape(28, 1536, 8960, queries=1536, keys=256, vocabulary=151936, tied=True)
LARGE = Shape(28, 3584, 18944, queries=3584, keys=512, vocabulary=152064, tied=False)
PAIR = Plan(SMALL, LARGE, batch=64, request=512, response=512, longest=1031)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = RESULTS / "phases.bf16.json"
SHARDED = RESULTS / "sharded_memory.bf16.json"
KINDS = {
    "gkd": {"adapts": False},
    "with_student": {"together": True},
    "before_student": {"together": False},
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_shape_counts_a_models_weights_but_for_norms_and_biases(name):
    module = tiny.model(name, num_layers=3, rows=256, width=64)
    counted = sum(p.numel() for p in module.parameters() if p.dim() == 2)

    assert Shape.of_config(module.config).weights == counted
    assert counted / num_parameters(module) > 0.95


@pytest.mark.parametrize("learns", [True, False])
def test_a_token_keeps_what_the_equation_says(learns):
    """In mixed precision, in transformers' own layers; attention in bf16."""
    module = tiny.model("qwen2", num_layers=2, width=64, intermediate_size=256)
    more = tiny.model("qwen2", num_layers=4, width=64, intermediate_size=256)
    kept = []
    for each in (module, more):
        each.set_attn_implementation("sdpa")
        each.requires_grad_(learns)
        model = LanguageModel(each if learns else each.to(torch.bfloat16), 104, torch.bfloat16)
        prompt = None if learns else torch.nn.Parameter(torch.zeros(2, 64))

        def speak(tokens, model=model, prompt=prompt):
            return model.hidden_states(tokens, prompt)

        kept.append(bytes_per_token(speak, list(each.parameters()), model.device))
    shape = Shape.of_config(module.config)
    per_layer = (kept[1] - kept[0]) / 2

    expected = shape.kept_per_token(learns, checkpointed=False) / shape.layers
    assert per_layer == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seconds_of_measured_steps_come_out_within_a_tenth(kind):
    """8 requests of 45 tokens on average and 128 new ones, SmolLM2 to 10 of its layers."""
    measured = json.loads(MEASURED.read_text())["methods"][kind]
    plan = Plan(SMOL10, SMOL, 8, 45, 128, longest=320, memory=1e12, **KINDS[kind])
    ours = step_seconds(plan, EPYC)

    assert sum(ours.values()) == pytest.approx(measured["seconds"]["whole"], rel=0.1)
    assert ours["teacher"] == pytest.approx(measured["seconds"]["teacher"], rel=0.1)


def test_the_bytes_of_measured_sharded_ranks_come_out_within_15_percent():
    """Random weights, 170 and 396 million; rows of at most 64 + 16 tokens, one on each rank."""
    measured = json.loads(SHARDED.read_text())
    student = Shape(8, 1152, 3072, queries=1152, keys=384, vocabulary=49152, tied=True)
    pair = {"student": student, "teacher": replace(student, layers=24)}
    ours = Plan(**pair, batch=2, request=64, response=16, longest=87, ranks=2, device="cpu")
    computed = peak_bytes(replace(ours, sharded=True), 128)

    for rank in measured["bytes"]:
        assert rank["step"] == pytest.approx(sum(computed.values()), rel=0.15)
    whole = sum(peak_bytes(ours, 128).values())
    assert max(rank["step"] for rank in measured["bytes"]) < 0.85 * whole


def test_the_bytes_of_a_pair_with_more_embeddings_come_out_too():
    """75 and 113 million, by benchmarks/sharded_memory.py; half of the student's are embeddings."""
    student = Shape(6, 768, 2048, queries=768, keys=256, vocabulary=49152, tied=True)
    pair = {"student": student, "teacher": replace(student, layers=12)}
    ours = Plan(**pair, batch=2, request=64, response=16, longest=87, ranks=2, device="cpu")
    shared = replace(ours, sharded=True)
    kinds = {
        "promptkd": (shared, (1.465e9, 1.429e9)),
        "gkd": (replace(shared, adapts=False), (1.435e9, 1.414e9)),
        "a LoRA student": (replace(shared, lora=True), (0.619e9, 0.586e9)),
    }
    for plan, ranks in kinds.values():
        computed = sum(peak_bytes(plan, 128).values())
        for measured in ranks:
            assert measured == pytest.approx(computed, rel=0.1)


def test_the_pair_of_a_whole_card_takes_what_was_computed_by_hand():
    """16 bytes a student's weight and 2 a teacher's: 24.7 + 15.2 GB (1.54 and 7.62 billion)."""
    with_vllm = replace(PAIR, vllm_share=0.3)
    held = standing_bytes(with_vllm)

    both = held["student"] + held["gradients and optimizer"] + held["teacher"]
    assert both == pytest.approx(39.9e9, rel=0.005)
    assert held["vLLM"] == 0.3 * 80e9
    assert writing_bytes(with_vllm) == 0
    assert writing_bytes(PAIR) > 2 * SMALL.weights


def test_requests_that_wait_for_a_row_are_read_beside_the_cache():
    """Half of PAIR's tokens are requests': of 32,768 in the cache, as many again are half."""
    cached = writing_bytes(PAIR) - 2 * SMALL.weights
    token = 4 * SMALL.layers * SMALL.keys
    at_once = writing_bytes(replace(PAIR, batch=31)) - 2 * SMALL.weights

    assert cached == token * 1.5 * 32768
    assert at_once == token * 31 * PAIR.longest


def test_sharding_divides_what_stands_and_quantising_the_teachers_layers():
    whole, sharded = (standing_bytes(replace(PAIR, ranks=8, sharded=s)) for s in (False, True))
    assert sharded["gradients and optimizer"] == whole["gradients and optimizer"] / 8
    assert sharded["teacher"] == whole["teacher"] / 8
    four = standing_bytes(replace(PAIR, quantization="4bit"))["teacher"]
    away = standing_bytes(replace(PAIR, offload=True))["teacher"]

    ends = 2 * (LARGE.weights - LARGE.trunk)
    assert away == ends
    assert four - ends == pytest.approx(LARGE.trunk * 4.5 / 8)


def test_graphs_count_singly_where_the_teacher_moves_first_and_together_where_with_it():
    alone = SMALL.kept_per_token(True, False), LARGE.kept_per_token(False, False)

    assert kept_per_token(PAIR) == max(alone)
    assert kept_per_token(replace(PAIR, together=True)) == sum(alone)
    assert kept_per_token(replace(PAIR, adapts=False)) == alone[0]


def test_a_vllm_that_sleeps_takes_its_share_while_it_writes_alone():
    awake = replace(PAIR, vllm_share=0.35)
    asleep = replace(awake, vllm_sleeps=True)

    assert "vLLM" not in standing_bytes(asleep)
    assert writing_bytes(asleep) == standing_bytes(awake)["vLLM"] == 0.35 * 80e9
    assert not fits(awake)
    assert ("sampling.vllm.enable_sleep_mode=true",) in remedies(awake)
    assert fits(asleep)


LONG = {
    "student": {"model": "small"},
    "teacher": {"model": "large"},
    "data": {"train": "a.jsonl", "max_request_tokens": 256, "max_response_tokens": 8192},
    "sampling": {"engine": "vllm"},
    "optimization": {"max_steps": 1, "global_batch_size": 64, "micro_batch_tokens": 8455},
    "output": "run",
}
CHECKPOINTED = ("optimization.gradient_checkpointing=true", "teacher.gradient_checkpointing=true")


def plan(*overrides: str) -> Plan:
    recipe = recipe_from_dict(override(copy.deepcopy(LONG), overrides))
    return plan_for(recipe, build_method("promptkd"), (SMALL, LARGE), Cluster(8, 80.0))


def test_responses_of_8k_tokens_fit_80_gb_once_the_recipe_checkpoints_both_graphs():
    """1.5B from 7B; the longest row is 256 + 8192 + 7."""
    assert plan().longest == 8455
    assert not fits(plan())
    assert not fits(plan(CHECKPOINTED[0]))
    assert fits(plan(*CHECKPOINTED))
    assert sum(peak_bytes(plan(*CHECKPOINTED), 8455).values()) < 0.9 * 80e9


def test_a_plan_is_sharded_and_sleeps_as_its_recipe_says():
    ours = plan("sharding=fsdp", *CHECKPOINTED[1:], "sampling={engine: transformers}")
    assert (ours.sharded, ours.checkpointed, ours.teacher_checkpointed) == (True, False, True)
    assert standing_bytes(ours)["teacher"] == standing_bytes(plan())["teacher"] / 8
    ours = plan("sampling.vllm={gpu_memory_utilization: 0.4, enable_sleep_mode: true}")
    assert (ours.vllm_share, ours.vllm_sleeps, ours.sharded) == (0.4, True, False)


def test_what_does_not_fit_names_keys_that_make_it_fit():
    large = replace(PAIR, student=LARGE, lora=False, memory=80e9)
    assert not fits(large)
    assert remedies(large) == [("student.lora={}",)]
    with_lora = replace(large, lora=True)
    assert fits(with_lora)
    tight = replace(PAIR, memory=50e9)
    assert not fits(tight)
    assert ("teacher.quantization=4bit",) in remedies(tight)


def test_where_no_key_is_enough_the_fewest_are_named_that_are_together():
    """1.5B from 7B on 24 GB: 24.7 GB of a whole student, 15.2 of a teacher."""
    small = replace(PAIR, memory=24e9, longest=775)
    assert {len(keys) for keys in remedies(small)} == {2}
    assert ("teacher.quantization=4bit", "student.lora={}") in remedies(small)
    assert not any(
        {"teacher.quantization=4bit", "teacher.offload=true"} <= {*k} for k in remedies(small)
    )
    assert remedies(replace(small, memory=4e9)) == []
    (said,) = [line for line in plan_lines(small, 10) if "does not fit" in line]
    assert "Together these make it fit: teacher.quantization=8bit, student.lora={}." in said


def test_a_plan_says_what_sharding_saves_and_what_the_recipe_asks_too_much():
    huge = replace(PAIR, student=LARGE, ranks=8, longest=1031)
    assert "On these cards sharding=fsdp makes it fit" in list(plan_lines(huge, 10))[-1]
    shared = list(plan_lines(replace(huge, sharded=True), 10))
    assert not any("of one card's speed" in line for line in shared)  # it wouldn't fit there
    asks = list(plan_lines(replace(PAIR, micro_batch=50000), 10))
    assert any("micro_batch_tokens is 50000, more than that" in line for line in asks)


def test_layers_that_stay_gathered_for_a_step_take_both_trunks_and_are_sent_once():
    passing = replace(PAIR, sharded=True, ranks=8, micro_batch=2048, batch=8 * 32)
    staying = replace(passing, gathered_for_step=True)
    gathered = [standing_bytes(each)["gathered"] for each in (passing, staying)]
    assert gathered[1] - gathered[0] == sum(2 * (s.trunk - 2 * s.layer) for s in (SMALL, LARGE))

    sent = [step_seconds(each, H100)["talk"] for each in (passing, staying)]
    trunks = 16 * (2 * SMALL.trunk + 4 * LARGE.trunk) - SMALL.trunk - LARGE.trunk
    assert sent[0] - sent[1] == pytest.approx(7 / 8 * 2 * trunks / H100.link)
    away = replace(staying, offload=True)
    assert step_seconds(away, H100)["fetching"] == pytest.approx(2 * LARGE.trunk / 8 / H100.bus)
    assert any("gathered_for=step" in line for line in plan_lines(passing, 10))
    tight = replace(passing, student=LARGE, teacher=SMALL, memory=45e9)
    assert fits(tight)
    assert not any("gathered_for=step" in line for line in plan_lines(tight, 10))
    assert ("gathered_for=pass",) in remedies(replace(tight, gathered_for_step=True))


def test_ranks_wait_for_the_one_with_most_rows():
    uneven, even = (replace(PAIR, batch=batch, ranks=8) for batch in (12, 16))
    assert uneven.rows == even.rows == 2
    assert step_seconds(uneven, H100)["student"] == step_seconds(even, H100)["student"]


def test_an_offloaded_teacher_crosses_the_bus_in_every_pass():
    away = replace(PAIR, offload=True, micro_batch=2048, batch=32)
    fetching = step_seconds(away, H100)["fetching"]
    assert fetching == pytest.approx(16 * 4 * 2 * LARGE.trunk / H100.bus)
    parts = replace(away, sharded=True, ranks=8, batch=8 * 32)
    assert step_seconds(parts, H100)["fetching"] == pytest.approx(fetching / 8)


def test_ranks_lose_to_their_talk_alone_and_more_over_the_network():
    shares = [weak_scaling(PAIR, H100, ranks) for ranks in (1, 8, 64, 512)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 0.9


def test_the_command_says_what_a_named_cluster_would_take_without_running(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    path = runs.write_recipe(tmp_path, tiny.recipe(tmp_path))
    result = runs.run(["check", path, "--gpus", "2", "--memory", "80"], tmp_path / "out")

    assert result.status == 0, result.stderr
    assert "computed, not measured, for 2 GPUs of 80 GB, replicas" in result.stdout
    assert "3 steps: about" in result.stdout
    assert not (tmp_path / "run").exists()
    small = runs.run(["check", path, "--gpus", "2", "--memory", "1"], tmp_path / "small")
    assert "this does not fit." in small.stdout
    many = runs.run(["check", path, "--gpus", "8"], tmp_path / "many")
    assert many.status == 1
    assert "global_batch_size 4 is smaller than the 8 GPUs" in many.stderr
