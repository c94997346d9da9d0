"""Two processes that share every weight give the numbers of one that has them all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import runs
import tiny
from promptkd.adapters import add_lora
from promptkd.config import recipe_from_dict
from promptkd.errors import UserError
from promptkd.keys import override
from promptkd.models import sharding
from promptkd.models.language_model import PADDING, LanguageModel
from promptkd.training.setup import _as_loaded
from test_ranks import assert_same_run, recipe

LORA = {"lora": {"r": 2, "alpha": 4}}
PROMPTKD = {"name": "promptkd", "rollouts": "reference"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({"name": "sft"}, {}),
    "gkd": ({"name": "gkd", "student_share": 0.0, "divergence": "forward_kl"}, {}),
    "promptkd": (PROMPTKD, {}),
    "promptkd, together": (PROMPTKD, {"teacher_step": "with_student"}),
    "promptkd, graphs kept": (PROMPTKD, {"micro_batch_tokens": 400}),
    "promptkd, checkpointed": (PROMPTKD, {"gradient_checkpointing": True}),
    "promptkd, adamw": (PROMPTKD, {"optimizer": "adamw", "learning_rate": 1e-3}),
    "lora teacher": (PROMPTKD | {"teacher": "lora"}, {}),
    "prefix teacher": (PROMPTKD | {"teacher": "prefix"}, {}),
    "minillm": ({"name": "minillm"}, {}),
    "distillm": ({"name": "distillm", "student_share": 1.0, "capacity": 2}, {}),
    "distillm2": ({"name": "distillm2"}, {}),
    "written by the student": ({"name": "promptkd"}, {}),
    "written at times": ({"name": "gkd", "student_share": 0.2}, {}),
}


OTHERS = ("lora student", "tied heads", "of one process")
BF16 = ("promptkd", "lora student")
FOR_A_STEP = (
    "promptkd",
    "promptkd, together",
    "lora teacher",
    "written by the student",
    "lora student",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    tiny.save_pair(directory)
    tied = {"tie_word_embeddings": True}
    tiny.save_pair(directory / "tied", "qwen2", student_options=tied, teacher_options=tied)
    tiny.write_data(directory / "train.jsonl")
    tiny.write_data(directory / "valid.jsonl", 3)
    return directory


@pytest.fixture(scope="module")
def raws(pair: Path) -> dict[str, dict[str, Any]]:
    """The recipes of both sides, without their output."""
    made = {}
    for name, (method, optimization) in CASES.items():
        made[name] = recipe(pair, method, Path("unset"), max_steps=2, **optimization)
    checkpointed = made["promptkd, checkpointed"]
    checkpointed["teacher"] = checkpointed["teacher"] | {"gradient_checkpointing": True}
    made["lora student"] = made["gkd"] | {"student": made["gkd"]["student"] | LORA}
    tied = {who: {"model": str(pair / "tied" / who)} for who in ("student", "teacher")}
    made["tied heads"] = made["promptkd"] | tied
    made["of one process"] = made["promptkd, adamw"]
    return made


@pytest.fixture(scope="module")
def shared(raws: dict[str, dict[str, Any]], tmp_path_factory) -> Path:
    """Runs of all cases on two processes that share both models; one was begun by one."""
    place = tmp_path_factory.mktemp("shared")
    begun = raws["of one process"] | {"output": str(place / "of one process")}
    runs.train_on_ranks([begun], place / "begun", 1)
    forget_last_step(place / "of one process")
    sides = raws | {f"{name}, bf16": raws[name] | {"precision": "bf16"} for name in BF16}
    own = [raw | {"sharding": "fsdp", "output": str(place / name)} for name, raw in sides.items()]
    for name in FOR_A_STEP:
        long = {"gathered_for": "step", "output": str(place / f"{name}, for a step")}
        own.append(raws[name] | {"sharding": "fsdp"} | long)
    with pytest.MonkeyPatch.context() as patched:  # no test's own cache is there yet
        patched.setenv("PROMPTKD_CACHE", str(place / "cache"))
        outcomes = runs.train_on_ranks(own, place / "processes", 2)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    return place


def forget_last_step(run: Path) -> None:
    """As if the run had been killed before its second step was saved."""
    shutil.rmtree(run / "checkpoints" / "step-000002")
    shutil.rmtree(run / "student")
    (run / "summary.json").unlink()


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_a_shared_run_equals_one_process(raws, shared, tmp_path, name):
    one = runs.train(raws[name] | {"output": str(tmp_path / "one")})

    assert_same_run(one, shared / name)


@pytest.mark.parametrize("name", FOR_A_STEP)
def test_layers_that_stay_gathered_for_a_step_change_no_result(shared, name):
    assert_same_run(shared / name, shared / f"{name}, for a step")


def test_one_process_goes_on_where_two_that_shared_were_stopped(raws, shared, tmp_path):
    name = "promptkd, adamw"
    one = runs.train(raws[name] | {"output": str(tmp_path / "one")})
    run = shutil.copytree(shared / name, tmp_path / "run")
    forget_last_step(run)
    runs.train(raws[name] | {"output": str(run)})

    assert_same_run(one, run)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.state_dict().keys() == tiny.model("llama").state_dict().keys()


@pytest.mark.parametrize("name", BF16)
def test_in_bf16_a_shared_run_is_no_further_from_fp32_than_one_process_is(
    raws, shared, tmp_path, name
):
    """What training changed in the student, up to twice the rounding of one process."""
    weights = {}
    for precision in ("fp32", "bf16"):
        raw = raws[name] | {"precision": precision, "output": str(tmp_path / precision)}
        weights[precision] = trained(runs.train(raw))
    weights["shared"] = trained(shared / f"{name}, bf16")
    alone, together = (distance(weights[side], weights["fp32"]) for side in ("bf16", "shared"))

    assert alone > 0
    assert 0 < together < 2 * alone
    places = tmp_path / "bf16", shared / f"{name}, bf16"
    rows = [runs.json_lines(run / "metrics.jsonl") for run in places]
    losses = [[row["loss"] for row in own if "loss" in row] for own in rows]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def trained(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "student").glob("*.safetensors")
    return load_file(path)


def distance(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert mine.keys() == other.keys()
    return sum((mine[key].float() - other[key].float()).square().sum() for key in mine) ** 0.5


def test_one_process_finishes_what_two_that_shared_began_when_one_was_killed(pair, tmp_path):
    raw = recipe(pair, {"name": "promptkd"}, tmp_path / "run", max_steps=6)
    one = runs.train(raw | {"output": str(tmp_path / "one")})
    path = runs.write_recipe(tmp_path, raw | {"sharding": "fsdp", "gathered_for": "step"})
    moment = runs.Moment("open", ".writing-step-000004")
    outcomes = runs.run_on_ranks(["train", path], tmp_path / "killed", 2, dies_at=moment)
    assert [outcome.status for outcome in outcomes] == [-9, 1]
    assert "Rank 0 of 2 was lost in the checkpoint of step 4" in outcomes[1].stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    runs.train(raw)

    assert_same_run(one, tmp_path / "run")


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_teacher_fetched_from_main_memory_speaks_and_teaches_its_prompt_alike(
    alone, monkeypatch, adapted
):
    """By the code of a card, on a processor: that it fetches from anywhere isn't tested."""
    policies = []

    def noted(part, **given):
        policies.append(given.get("offload_policy"))
        return fully_shard(part, **given)

    monkeypatch.setattr(sharding, "fully_shard", noted)
    tokens, found = torch.tensor([[5, 6, 7, 8], [9, 10, 11, PADDING]]), []
    for offload in (False, True):
        module = tiny.model("qwen2", num_layers=2, seed=1).requires_grad_(False)
        if adapted:
            add_lora(module, 2, 4, (), seed=0)
        if offload:
            sharding.shard(module, torch.device("cpu"), offload=True)
        prompt = torch.nn.Parameter(torch.linspace(-1, 1, 2 * tiny.WIDTH).view(2, tiny.WIDTH))
        hidden = LanguageModel(module, tiny.ROWS).hidden_states(tokens, prompt)
        hidden[tokens != PADDING].square().sum().backward()
        learnt = [p.grad for name, p in module.named_parameters() if "lora_" in name]
        found.append([hidden[tokens != PADDING].detach(), prompt.grad, *learnt])

    assert [type(policy) for policy in policies] == [CPUOffloadPolicy, CPUOffloadPolicy, NoneType]
    assert len(found[0]) == (2 if not adapted else 2 + 8)
    assert_close(found[0], found[1])


ROWS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, PADDING], [3, 4, PADDING, PADDING]])


def taught(rows: torch.Tensor, share: Callable[[Any], None]) -> list[torch.Tensor]:
    """Hidden states of a teacher with prompt and adapters, and the gradients of those two."""
    module = tiny.model("qwen2", num_layers=2, seed=1).requires_grad_(False)
    add_lora(module, 2, 4, (), seed=0)
    share(module)
    prompt = torch.nn.Parameter(torch.linspace(-1, 1, 2 * tiny.WIDTH).view(2, tiny.WIDTH))
    model = LanguageModel(module, tiny.ROWS)
    for _ in range(2):  # what was given back is fetched anew
        hidden = model.hidden_states(rows, prompt)[rows != PADDING]
        hidden.square().sum().backward()
    adapters = [own.grad for name, own in module.named_parameters() if "lora_" in name]
    return [hidden.detach(), prompt.grad, *adapters]


def fetch_on_rank(rank: int, place: Path, stays: bool) -> None:
    """In a process of its own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}/group", rank=rank, world_size=2
    )
    here = torch.device("cpu")
    own = taught(ROWS[rank::2], lambda m: sharding.shard(m, here, offload=True, stays=stays))
    for gradient in own[1:]:
        torch.distributed.all_reduce(gradient)
    torch.save(own, place / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stays", [False, True])
def test_two_processes_fetch_their_parts_of_a_teacher_and_have_the_gradients_of_one(
    tmp_path, stays
):
    processes = [runs.process(fetch_on_rank, rank, tmp_path, stays) for rank in range(2)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    hidden, *gradients = taught(ROWS, lambda module: None)
    mine, others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    real = ROWS != PADDING
    rows = torch.split(hidden, real.sum(1).tolist())

    assert_close(mine[0], torch.cat([rows[0], rows[2]]))
    assert_close(others[0], rows[1])
    assert len(gradients) == 1 + 8
    assert_close(mine[1:], gradients)
    assert_close(others[1:], gradients)


def test_parts_are_offloaded_of_a_model_that_was_loaded_whole_and_not_on_a_cpu(pair):
    raw = recipe(pair, {"name": "promptkd"}, pair / "unset") | {"sharding": "fsdp"}
    raw["teacher"] = raw["teacher"] | {"offload": True}
    given = recipe_from_dict(raw)
    loaded, device = _as_loaded(given, torch.device("cuda"))
    assert device.type == "cpu"
    assert (given.teacher.offload, loaded.teacher.offload) == (True, False)
    with pytest.raises(UserError, match=r"teacher.offload is true, but this run computes on the"):
        _as_loaded(given, torch.device("cpu"))


@pytest.mark.parametrize(
    ("layer", "rounded"),
    [
        (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)), torch.bfloat16),
        (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(4, 4)), None),
    ],
)
def test_layers_are_rounded_before_they_are_gathered_if_autocast_would_round_them(layer, rounded):
    policy = sharding._precision(layer, torch.bfloat16)
    assert policy.param_dtype == rounded
    assert sharding._precision(layer, None).param_dtype is None


@pytest.mark.parametrize("stays", [False, True])
def test_layers_are_given_back_behind_each_pass_or_stay_and_the_ends_stay_until_released(
    alone, stays
):
    module = tiny.model("llama", num_layers=2)
    model, tokens = LanguageModel(module, tiny.ROWS), torch.tensor([[5, 6, 7, 8]])
    sharding.shard(module, torch.device("cpu"), stays=stays)
    layer, ends = module.model.layers[0].mlp.up_proj, module.get_input_embeddings()
    assert isinstance(layer.weight, DTensor)
    for last in (False, True):
        hidden = model.hidden_states(tokens)
        sharding.expect_gradients(module, last)
        whole = [not isinstance(own.weight, DTensor) for own in (layer, ends)]
        assert whole == [stays, True]
        hidden.square().sum().backward()
        whole = [not isinstance(own.weight, DTensor) for own in (layer, ends)]
        assert whole == [stays, not last]
        assert isinstance(ends.weight.grad, DTensor) == last  # cut and summed with the last
    sharding.release(module)
    weights = [own for own in module.parameters() if own.dim() > 1]

    assert all(isinstance(own, DTensor) for own in weights)
    assert all(own.grad is not None for own in module.base_model.parameters())


def test_one_process_is_refused(pair):
    raw = recipe(pair, {"name": "promptkd"}, pair / "refused") | {"sharding": "fsdp"}
    with pytest.raises(UserError, match=r"sharding is fsdp, .* but there is one"):
        runs.train(raw)


def test_what_is_not_shared_is_not_gathered_for_a_step(pair):
    raw = recipe(pair, {"name": "promptkd"}, pair / "refused") | {"gathered_for": "step"}
    with pytest.raises(UserError, match="gathered_for: step needs sharding: fsdp"):
        recipe_from_dict(raw)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ("teacher.model: student", "teacher.model=student"),
        ("sampling.engine: vllm", "sampling.engine=vllm"),
        ("attention: flash", "attention=flash"),
        ("a measured micro_batch_tokens", "optimization.micro_batch_tokens=null"),
        ("teacher.quantization", "teacher.quantization=8bit"),
    ],
)
def test_what_cannot_be_shared_is_refused(pair, other, key):
    raw = recipe(pair, {"name": "promptkd"}, pair / "refused") | {"sharding": "fsdp"}
    with pytest.raises(UserError, match=f"sharding: fsdp and {other} don't go together"):
        recipe_from_dict(override(raw, [key]))
