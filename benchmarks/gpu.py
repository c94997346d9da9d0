"""One card in at most eight minutes: that it computes what the CPU does, and how fast.

    python benchmarks/gpu.py            on a machine with a GPU
    python benchmarks/gpu.py --tiny     a rehearsal of every section on a CPU, in a minute

Random weights in published shapes; nothing is downloaded, and every section may fail alone. Writes
results/gpu/CARD.json, of which docs/generate.py makes the table of docs/benchmarks.md. A rehearsal
writes nothing: its numbers say nothing about a card.
"""

import copy
import gc
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_choices import CHOICES
from gpu_setting import (
    BF16,
    DEVICE,
    QWEN,
    SMALLEST,
    TINY,
    language_model,
    seconds_of,
)
from setting import RESULTS, machine
from torch import nn

from promptkd.divergences import reverse_kl
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.methods import build_method
from promptkd.models.frozen import Storage
from promptkd.models.language_model import PADDING, Head, LanguageModel, select_responses
from promptkd.objectives import States, Tiling, accumulate
from promptkd.rollouts import Rollout
from promptkd.teachers import SoftPromptTeacher
from promptkd.training.sizing import Shape
from promptkd.training.step import Learner, Step, StepSettings
from promptkd.training.token_budget import bytes_per_token

AT_MOST = 8 * 60
"""Seconds; sections that would begin later are left out, and said to be."""


def pair(student: str, teacher: str) -> Callable[[int], Step]:
    """PromptKD's step, for a number of tokens of its micro-batches."""
    own, other = language_model(student, torch.float32, learns=True), language_model(teacher)
    width = other.module.config.hidden_size
    taught = SoftPromptTeacher(other, torch.randn(7, width, device=DEVICE) * 0.02, trainable=True)

    def step(micro_batch_tokens: int) -> Step:
        weights, prompt = list(own.module.parameters()), taught.parameters()
        return Step(
            build_method("promptkd"),
            own,
            taught,
            student_learner=Learner(weights, torch.optim.AdamW(weights, lr=1e-6, fused=True)),
            teacher_learner=Learner(prompt, torch.optim.AdamW(prompt, lr=1e-6)),
            settings=StepSettings(micro_batch_tokens=micro_batch_tokens),
        )

    return step


def rollouts(rows: int, request: int, response: int) -> list[Rollout]:
    """Responses between half and the whole of their length."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for row in range(rows):
        new = int(response * (0.5 + 0.5 * torch.rand(1, generator=generator).item()))
        ids = torch.randint(5, 600, (request + new,), generator=generator).tolist()
        made.append(Rollout(row, tuple(ids[:request]), tuple(ids[request:]), "student"))
    return made


def card() -> dict[str, Any]:
    """The products, the copies and the launches that it can do."""
    size, length = (256, 1 << 20) if TINY else (8192, 2 << 30)
    one = torch.randn(size, size, device=DEVICE, dtype=BF16)
    source = torch.empty(length, device=DEVICE, dtype=torch.uint8)
    target, small = torch.empty_like(source), torch.ones(8, device=DEVICE)
    launch = seconds_of(lambda: [small.add_(1) for _ in range(1000)]) / 1000
    return {
        "TFLOP/s": 2 * size**3 / seconds_of(lambda: one @ one) / 1e12,
        "GB/s": 2 * length / seconds_of(lambda: target.copy_(source)) / 1e9,
        "us a launch": 1e6 * launch,
    }


def equal_to_the_cpu() -> dict[str, Any]:
    """Largest relative error of PromptKD's gradients, fp32; above 1e-4 nothing else matters."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import tiny

    def gradients(given: tuple[Any, Any], device: torch.device) -> list[torch.Tensor]:
        moved = [copy.deepcopy(each).to(device) for each in given]
        own, other = (LanguageModel(each, tiny.ROWS) for each in moved)
        tokens = torch.randint(2, tiny.ROWS, (4, 12), generator=torch.Generator().manual_seed(0))
        tokens[1, 9:] = PADDING
        mask = (tokens != PADDING) & (torch.arange(12) > 4)
        tokens, mask = tokens.to(device), mask.to(device)
        start = torch.randn(4, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
        prompt = nn.Parameter(start.to(device))
        states = {
            "student": States(select_responses(own.hidden_states(tokens), mask), own.head, True),
            "teacher": States(
                select_responses(other.hidden_states(tokens, prompt), mask), other.head, True
            ),
        }
        accumulate(states, _both_kls, {"adapt": 0.1, "learn": 0.1})
        return [prompt.grad.cpu(), *(p.grad.cpu() for p in moved[0].parameters())]  # pyright: ignore

    worst = {}
    for name in ("qwen2", "llama", "gpt2", "gemma2"):
        given = tiny.model(name, 2, seed=1), tiny.model(name, 3, seed=2).requires_grad_(False)
        both = [gradients(given, device) for device in (torch.device("cpu"), DEVICE)]
        errors = [
            ((a - b).norm() / a.norm().clamp_min(1e-9)).item() for a, b in zip(*both, strict=True)
        ]
        worst[name] = max(errors)
    return {"relative error": worst}


def _both_kls(logprobs: Any, tile: slice) -> dict[str, torch.Tensor]:
    teacher, student = logprobs["teacher"], logprobs["student"]
    return {
        "adapt": reverse_kl(teacher, student.detach()),
        "learn": reverse_kl(student, teacher.detach()),
    }


def same_bits() -> dict[str, Any]:
    """Whether one gradient, computed twice, is one."""
    model = language_model("10 layers", torch.float32, learns=True)
    tokens, found = torch.randint(5, 600, (4, 100), device=DEVICE), []
    for _ in range(2):
        model.module.zero_grad()
        model.hidden_states(tokens).float().square().sum().backward()
        grads = [p.grad for p in model.module.base_model.parameters() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in grads]).clone())
    one, other = found
    return {
        "same": float(torch.equal(one, other)),
        "relative": float((one - other).norm() / one.norm()),
    }


def steps(student: str, teacher: str, written: list[Rollout], budgets: tuple[int, ...]) -> dict:
    made, rows = pair(student, teacher), {}
    for budget in budgets:
        step = made(budget)
        try:
            seconds = seconds_of(partial(step, [written], 0, 100))
            cost = step([written], 1, 100).cost
        except torch.OutOfMemoryError:
            rows[budget] = "out of memory"
            continue
        rows[budget] = {
            "s": seconds,
            **{f"s {phase}": took for phase, took in cost.seconds.items()},
            "TFLOP/s": sum(cost.flops.values()) / seconds / 1e12,
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0,
        }
    return {"tokens of a micro-batch": rows}


def small_step() -> dict[str, Any]:
    """SmolLM2-135M to 10 of its layers, 8 x (64 + 128)."""
    response, budgets = (16, (256,)) if TINY else (128, (4096, 32768))
    return steps("10 layers", "135M", rollouts(8, 64, response), budgets)


def large_step() -> dict[str, Any]:
    """7B to 1.5B, 16 x (512 + 512)."""
    length, budgets = (16, (64,)) if TINY else (512, (1040, 2786, 6200))
    return steps("1.5B", "7B", rollouts(16, length, length), budgets)


def writing() -> dict[str, Any]:
    """Milliseconds of a token step, by rows."""
    rows = {}
    for name in ("10 layers", "1.5B"):
        engine = TransformersEngine(language_model(name), ())
        for num in (2,) if TINY else (8, 64, 256):
            requests, new = [tuple(range(5, 69))] * num, 4 if TINY else 32
            seeds = [(0, row) for row in range(num)]
            decoding = GenerationSettings(new)
            write = partial(engine.generate, requests, seeds, decoding, max_batch_tokens=1 << 22)
            rows[f"{name}, {num} rows"] = seconds_of(write, 1) / new * 1e3
    return {"ms a token": rows}


def losses() -> dict[str, Any]:
    """Milliseconds of both KLs over 2,048 tokens of 1.5B and 7B, by chunk / tile entries."""
    tokens = 32 if TINY else 2048
    own, other = (QWEN["1.5B"], QWEN["7B"]) if not TINY else (SMALLEST, SMALLEST)
    vocabulary = own[0]
    student = nn.Parameter(torch.randn(vocabulary, own[1], device=DEVICE) * 0.02)
    teacher = torch.randn(vocabulary, other[1], device=DEVICE, dtype=BF16) * 0.02
    student.grad = torch.zeros_like(student)

    def run(tiling: Tiling) -> None:
        states = {
            name: States(
                torch.randn(tokens, weight.shape[1], device=DEVICE, dtype=BF16).requires_grad_(),
                Head(weight, None, vocabulary, dtype=BF16),
                True,
            )
            for name, weight in (("student", student), ("teacher", teacher))
        }
        accumulate(states, _both_kls, {"adapt": 1 / tokens, "learn": 1 / tokens}, tiling)

    tilings = [(1e5, 1e5)] if TINY else [(c, t) for c in (64e6, 256e6) for t in (4e6, 16e6, 64e6)]
    return {
        "ms": {
            f"{chunk / 1e6:g} M / {tile / 1e6:g} M": 1e3
            * seconds_of(partial(run, Tiling(int(chunk), int(tile))), 2)
            for chunk, tile in tilings
        }
    }


def budget() -> dict[str, Any]:
    """MB that a token keeps, counted and by the equation of ``training.sizing``."""
    rows = {}
    for name, learns in (("1.5B", True), ("7B", False)):
        model = language_model(name, torch.float32 if learns else BF16, learns)
        prompt = None
        if not learns:
            prompt = nn.Parameter(torch.zeros(7, model.module.config.hidden_size, device=DEVICE))
        speak = partial(model.hidden_states, soft_prompt=prompt)
        counted = bytes_per_token(speak, list(model.module.parameters()), DEVICE)
        expected = Shape.of_config(model.module.config).kept_per_token(learns, False)
        rows[name] = {"MB counted": counted / 1e6, "MB by the equation": expected / 1e6}
        del model
    return rows


def teacher_off_the_card() -> dict[str, Any]:
    """A prompted pass of the 7B, forward and backward, its layers held whole or fetched."""
    rows, tokens = {}, torch.randint(5, 600, (4, 16 if TINY else 512), device=DEVICE)
    for name in ("whole", "offload"):
        model = language_model("7B")
        if name == "offload":
            Storage(offload=True).apply(model.module.cpu(), "7B")
            model.module.to(DEVICE)
        prompt = nn.Parameter(torch.randn(7, model.module.config.hidden_size, device=DEVICE) * 0.02)
        speak = partial(model.hidden_states, tokens, prompt)
        rows[f"{name}, s"] = seconds_of(lambda s=speak: s().float().sum().backward(), 2)
        del model, speak
        gc.collect()
    return rows


SECTIONS = (
    *(card, equal_to_the_cpu, same_bits, small_step, writing, losses, budget),
    *CHOICES,
    *(teacher_off_the_card, large_step),
)


def main() -> None:
    if DEVICE.type == "cpu" and not TINY:
        print("no GPU here: nothing is measured. --tiny rehearses on the CPU.")
        return
    started, found = time.perf_counter(), {}
    for section in SECTIONS:
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            if begun - started > AT_MOST:
                raise TimeoutError("eight minutes are over")
            found[section.__name__] = section()
        except Exception as error:
            found[section.__name__] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        took = round(time.perf_counter() - begun, 1)
        print(json.dumps({"section": section.__name__, "took_s": took, **found[section.__name__]}))
    if TINY:
        sys.exit(any("failed" in each for each in found.values()))
    name = torch.cuda.get_device_name()
    path = RESULTS / "gpu" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**found, "machine": machine() | {"card": name}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
