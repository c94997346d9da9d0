"""Steps by plain and by compiled kernels, side by side, as a program of its own.

Not in a test's process: the shapes that tests check there are calls that a compiler would trace.

    python compiled_steps.py BACKEND DEVICE CASE ...
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.utils import counters

import tiny
from promptkd import kernels
from promptkd.adapters import add_lora
from promptkd.divergences import forward_kl  # noqa: F401  a user's own, by its module
from promptkd.kernels import compiled
from promptkd.methods import build_method
from promptkd.models.language_model import LanguageModel
from promptkd.objectives import Tiling
from promptkd.rollouts import Rollout
from promptkd.training.learner import Learner
from promptkd.training.setup import _checkpoint_gradients
from promptkd.training.step import Step, StepSettings

LENGTHS = (  # request and response of each row, step by step: two micro-batches of several rows
    ((3, 4), (8, 1), (1, 9), (5, 7), (4, 10)),
    ((2, 4), (5, 3), (1, 10), (9, 4), (4, 12)),
    ((1, 3), (2, 3), (7, 1), (1, 8), (6, 8), (12, 3)),
)
CASES: dict[str, dict[str, Any]] = {
    "promptkd": {},
    "with_student": {"teacher_step": "with_student"},
    "gkd": {"method": "gkd"},
    "sft": {"method": "sft"},
    "taid": {"method": "taid"},
    "checkpointing": {"checkpointing": True},
    "padded": {"packing": False},
    "lora": {"method": "gkd", "lora": True},
    "lora teacher": {"options": {"teacher": "lora"}},
    "own": {"method": "gkd", "options": {"divergence": "compiled_steps:forward_kl"}},
    "losses": {"teacher_step": "with_student", "layers": False},
}


def written(step: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(step)
    rollouts = []
    for index, (request, response) in enumerate(LENGTHS[step]):
        ids = torch.randint(2, 98, (request + response,), generator=generator).tolist()
        rollouts.append(Rollout(index, tuple(ids[:request]), tuple(ids[request:]), "student"))
    return rollouts


def step_of(
    device: torch.device,
    fused: bool,
    method: str = "promptkd",
    options: dict[str, Any] | None = None,
    teacher_step: str = "before_student",
    checkpointing: bool = False,
    packing: bool = True,
    layers: bool = True,
    lora: bool = False,
) -> Step:
    """Two micro-batches, of two tiles and more; SGD with rate 1, so that updates are gradients."""
    composition = build_method(method, **(options or {}))
    models = []
    for number, learns in ((2, True), (3, False)):
        module = tiny.model("llama", num_layers=number, seed=number).requires_grad_(learns)
        kernels.prepare(module.to(device), device, compiled=fused and layers)
        if lora and learns:
            add_lora(module, 4, 8, (), 0)
        if checkpointing:
            _checkpoint_gradients(module)
        models.append(LanguageModel(module, tiny.ROWS, packing=packing))
    student, other = models
    teacher = composition.teacher and composition.teacher.build(other, tiny.tokenizer())
    own = [weight for weight in student.module.parameters() if weight.requires_grad]
    adapted = teacher.parameters() if teacher else []
    for weight in adapted:
        if not weight.any():  # an adapter of zeros leaves its teacher alone: losses of 0
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return Step(
        composition,
        student,
        teacher,
        student_learner=Learner(own, torch.optim.SGD(own, lr=1.0)),
        teacher_learner=Learner(adapted, torch.optim.SGD(adapted, lr=1.0)) if adapted else None,
        settings=StepSettings(
            micro_batch_tokens=30,
            max_grad_norm=1e9,
            teacher_step=teacher_step,
            tiling=Tiling(9 * tiny.ROWS, 4 * tiny.ROWS),
            compiled=fused,
        ),
    )


def compared(case: str, device: torch.device) -> SimpleNamespace:
    """Largest errors of losses and weights over all steps, and functions compiled in each."""
    steps = {fused: step_of(device, fused, **CASES[case]) for fused in (False, True)}
    apart = SimpleNamespace(nats=0.0, moved=0.0, compiled=[])
    for number in range(len(LENGTHS)):
        before, found = counters["stats"]["unique_graphs"], {}
        for fused, step in steps.items():
            there = [own.detach().clone() for own in weights(step)]
            terms = len(step.method.terms)
            nats = step(terms * [written(number)], number, 2 * len(LENGTHS)).nats
            moved = [own.detach() - was for own, was in zip(weights(step), there, strict=True)]
            found[fused] = nats, moved
            with torch.no_grad():  # what is rounded here is no part of the next step
                for own, was in zip(weights(step), there, strict=True):
                    own.copy_(was)
            if step.teacher:
                step.teacher.observe(nats["student"], number / len(LENGTHS))
        (plain, by_plain), (fast, by_fast) = found[False], found[True]
        assert plain.keys() == fast.keys()
        apart.nats = max([apart.nats, *(abs(fast[n] / plain[n] - 1) for n in plain)])
        scale = torch.cat([own.flatten() for own in by_plain]).norm()
        for own, other in zip(by_plain, by_fast, strict=True):
            error = (own - other).norm() / own.norm().maximum(1e-2 * scale)
            apart.moved = max(apart.moved, error.item())
        apart.compiled.append(counters["stats"]["unique_graphs"] - before)
    return apart


def weights(step: Step) -> list[torch.nn.Parameter]:
    return [weight for learner in step.learners for weight in learner.parameters]


if __name__ == "__main__":
    torch.set_num_threads(1)
    compiled.BACKEND = sys.argv[1]
    found = {}
    for case in sys.argv[3:]:
        found[case] = vars(compared(case, torch.device(sys.argv[2])))
        print(case, found[case], file=sys.stderr, flush=True)
    print(json.dumps(found))
