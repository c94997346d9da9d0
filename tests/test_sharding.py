"""Two processes that share every weight compute what one with whole weights does."""

import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import tiny
from promptkd.divergences import reverse_kl
from promptkd.models import sharding
from promptkd.models.language_model import PADDING, LanguageModel, select_responses
from promptkd.objectives import States, accumulate

CPU = torch.device("cpu")


def pair(tied: bool) -> tuple[Any, Any]:
    return (
        tiny.model("qwen2", 2, seed=1, tie_word_embeddings=tied),
        tiny.model("qwen2", 3, seed=2, tie_word_embeddings=tied),
    )


def gradients(student: Any, teacher: Any, rank: int, number: int) -> torch.Tensor:
    """Both updates of a PromptKD step on this process's rows; returns the soft prompt's."""
    teacher.requires_grad_(False)
    rows = torch.randint(2, tiny.ROWS, (4, 12), generator=torch.Generator().manual_seed(0))
    rows[1, 9:] = PADDING
    mask = (rows != PADDING) & (torch.arange(12) > 4)
    weights = dict.fromkeys(("student", "teacher"), 1 / mask.sum().item())
    generator = torch.Generator().manual_seed(3)
    prompt = torch.nn.Parameter(torch.randn(4, tiny.WIDTH, generator=generator))
    models = [LanguageModel(module, tiny.ROWS) for module in (student, teacher)]
    for row in range(rank, 4, number):
        tokens, here = rows[row : row + 1], mask[row : row + 1]
        for learner in ("teacher", "student"):
            states = {}
            for name, model in zip(("student", "teacher"), models, strict=True):
                given = [prompt] if name == "teacher" else []
                with torch.set_grad_enabled(name == learner):
                    hidden = select_responses(model.hidden_states(tokens, *given), here)
                states[name] = States(hidden, model.head, name == learner)

            def losses(logprobs: Any, tile: slice, learner: str = learner):
                other = {"student": "teacher", "teacher": "student"}[learner]
                return {learner: reverse_kl(logprobs[learner], logprobs[other].detach())}

            accumulate(states, losses, weights)
    assert prompt.grad is not None
    return prompt.grad


def work(rank: int, port: int, place: str, tied: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    whole = pair(tied)
    shared = [sharding.load_sharded(partial(list.pop, [m]), CPU, torch.float32) for m in whole]
    prompt = gradients(*shared, rank, 2)
    dist.all_reduce(prompt)
    sharding.release(shared[0])
    found = {
        n: sharding.full(p.grad) for n, p in shared[0].named_parameters() if p.grad is not None
    }
    parts = sum(sharding.part(p).numel() for p in shared[0].parameters())
    copied = sharding.empty_copy(shared[0])
    sharding.fill(copied, sharding.plain_weights(shared[0]), CPU, torch.float32)
    if rank == 0:
        torch.save([prompt, found, parts, copied.state_dict()], place)
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_and_copies_are_those_of_whole_models(tmp_path: Path, tied: bool):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = str(tmp_path / "found")
    torch.multiprocessing.spawn(work, (port, place, tied), nprocs=2)
    prompt, found, parts, copied = torch.load(place)
    student, teacher = pair(tied)
    expected_prompt = gradients(student, teacher, 0, 1)
    expected = {name: p.grad for name, p in student.named_parameters()}

    assert_close(prompt, expected_prompt, rtol=1e-5, atol=1e-6)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert parts <= 0.55 * sum(p.numel() for p in student.parameters())
    assert_close(copied, dict(student.state_dict()), rtol=0, atol=0)
