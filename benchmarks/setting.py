"""What every benchmark of a training step shares: models, requests, clocks, records.

The teacher is SmolLM2-135M-Instruct out of its wheel, the student keeps some of its layers. With
forced lengths these are evenly spaced (speed doesn't depend on which) and the requests are those of
the packaged starter data. With a data file, its requests are answered by a student whose layers
were chosen by calibration, so that it ends responses by itself.
"""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from promptkd import kernels
from promptkd.data import Encoder, read_examples, training_set
from promptkd.distillation.demo import unpack_teacher
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.generation.vllm_engine import VLLMEngine
from promptkd.kernels.allocator import keep_freed_memory
from promptkd.methods import build_method
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loading import compute_dtype, load_tokenizer, stop_ids
from promptkd.pruning import init_student
from promptkd.rollouts import Rollout
from promptkd.training.learner import Learner
from promptkd.training.step import Cost, Step, StepMetrics, StepSettings

MODELS = Path("runs/benchmarks")
RESULTS = Path(__file__).parent / "results"
DTYPE = compute_dtype("auto", torch.device("cpu"))
"""What every side multiplies in: bf16 where the CPU does it itself."""
BF16 = torch.bfloat16 == DTYPE
PRECISION = "bf16" if BF16 else "fp32"
DTYPES = (torch.bfloat16, torch.float32) if BF16 else (torch.float32,)
"""In which the CPU multiplies by itself."""


@dataclass(frozen=True)
class Setting:
    """Two models and the requests of one optimizer step.

    Attributes:
        teacher: in ``DTYPE``.
        student: in fp32, which is what learns (master weights).
        requests: token ids.
        num_new: response tokens, exact if ``forced``, else at most.
        forced: no token ends a response.
    """

    teacher: Any
    student: Any
    tokenizer: Any
    requests: tuple[tuple[int, ...], ...]
    num_new: int
    forced: bool

    @property
    def stop(self) -> tuple[int, ...]:
        return () if self.forced else stop_ids(self.tokenizer, self.student)


def setting(
    num_requests: int = 8, num_new: int = 128, num_layers: int = 10, data: str | None = None
) -> Setting:
    """Load everything; the first call on a machine also writes the two models.

    Args:
        data: a JSONL file whose first requests of at most 256 tokens are answered in lengths as
            they come; the packaged starter data and forced lengths without it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    kind = "calibrated" if data else "even"
    teacher, student = MODELS / "teacher", MODELS / f"student-{num_layers}-{kind}"
    starter = str(resources.files("promptkd") / "starter" / "train.jsonl")
    if not teacher.exists():
        unpack_teacher(teacher)
    if not student.exists():
        calibration = starter if data else None
        init_student(str(teacher), num_layers, student, calibration=calibration, template="chat")
    tokenizer = load_tokenizer(str(teacher))
    encoder = Encoder(tokenizer, "chat", max_request_tokens=256, max_response_tokens=num_new)
    rows = training_set(read_examples([data or starter])[: 4 * num_requests], encoder)
    requests = tuple(example.request_ids for example in rows.examples[:num_requests])
    # Not by promptkd's loader, which puts its kernels into the model: peers have theirs.
    load = AutoModelForCausalLM.from_pretrained
    return Setting(
        load(teacher, dtype=DTYPE).eval().requires_grad_(False),
        load(student, dtype=torch.float32).eval(),
        tokenizer,
        requests,
        num_new,
        data is None,
    )


class OurStep:
    """A step of one of promptkd's methods, in its two phases."""

    def __init__(
        self,
        setting: Setting,
        method: str,
        teacher_step: str = "before_student",
        vllm: bool = False,
        vocabulary: int | None = None,
        micro_batch_tokens: int = 4096,
        keep_memory: bool = True,
        compiled: bool = False,
    ):
        if keep_memory:  # as promptkd's commands do
            keep_freed_memory()
        self.setting = setting
        vocabulary = vocabulary or setting.teacher.config.vocab_size
        for module in (setting.student, setting.teacher):  # as promptkd's loader does
            kernels.prepare(module, module.device, compiled=compiled)
        kernels.prepare_learner(setting.student, setting.student.device)
        student = proven(LanguageModel(setting.student, vocabulary, DTYPE), "student")
        composition = build_method(method)
        assert composition.teacher is not None
        teacher = composition.teacher.build(
            proven(LanguageModel(setting.teacher, vocabulary, DTYPE), "teacher"), setting.tokenizer
        )
        own, adapted = list(setting.student.parameters()), teacher.parameters()
        self.engine: Engine = TransformersEngine(student, setting.stop)
        if vllm:
            longest = setting.num_new + max(len(request) for request in setting.requests)
            self.engine = VLLMEngine(student, setting.stop, longest)
        self.decoding = GenerationSettings(setting.num_new)
        self.step = Step(
            composition,
            student,
            teacher,
            student_learner=Learner(own, torch.optim.AdamW(own, lr=1e-5, fused=True)),
            teacher_learner=(
                Learner(adapted, torch.optim.AdamW(adapted, lr=1e-3)) if adapted else None
            ),
            settings=StepSettings(
                micro_batch_tokens=micro_batch_tokens, teacher_step=teacher_step, compiled=compiled
            ),
        )

    def write(self, number: int) -> list[Rollout]:
        requests = self.setting.requests
        seeds = [(number, row) for row in range(len(requests))]
        written = self.engine.generate(requests, seeds, self.decoding)
        return [
            Rollout(row, request, response.token_ids, "student")
            for row, (request, response) in enumerate(zip(requests, written, strict=True))
        ]

    def learn(self, rollouts: list[Rollout], number: int) -> StepMetrics:
        return self.step([rollouts], step=number, max_steps=1000)

    def __call__(self, number: int) -> int:
        """A whole step; its response tokens."""
        rollouts = self.write(number)
        self.learn(rollouts, number)
        return sum(len(rollout.response_ids) for rollout in rollouts)

    def timed(self, number: int) -> tuple[dict[str, float], Cost]:
        """One step: its seconds by phase ("rest" and "whole" among them), and what it cost."""
        started = time.perf_counter()
        rollouts = self.write(number)
        written = time.perf_counter()
        cost = self.learn(rollouts, number).cost
        whole = time.perf_counter() - started
        seconds = {"writing": written - started, **cost.seconds}
        return seconds | {"rest": whole - sum(seconds.values()), "whole": whole}, cost


Side = Callable[[int], Any]
"""One piece of work, given its number."""


def own_process(build: Callable[[], Mapping[str, Side]], *names: str) -> dict[str, Side]:
    """Sides in a process of their own, with the allocator, threads and caches they come with."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(build, theirs), daemon=True).start()

    def asked(name: str, number: int) -> Any:
        ours.send((name, number))
        return ours.recv()

    return {name: partial(asked, name) for name in names}


def _serve(build: Callable[[], Mapping[str, Side]], pipe: Any) -> None:
    sides = build()
    with suppress(EOFError):  # nobody holds the other end any more
        while True:
            name, number = pipe.recv()
            pipe.send(sides[name](number))


@dataclass
class Timings:
    """Of one side: seconds and response tokens of each of its turns."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """Median over all turns."""
        pairs = zip(self.seconds, self.tokens, strict=True)
        return statistics.median(seconds / tokens for seconds, tokens in pairs)


def alternate(sides: Mapping[str, Side], repeats: int = 3) -> dict[str, Timings]:
    """Every side in turns; each returns the response tokens of its turn."""
    timings = {name: Timings() for name in sides}
    for number in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            timings[name].tokens.append(side(number))
            timings[name].seconds.append(round(time.perf_counter() - started, 3))
            print(f"{name}: {timings[name].seconds[-1]} s", flush=True)
    return timings


def times_faster(timings: Mapping[str, Timings], than: str) -> dict[str, float]:
    """Ratios of medians of seconds per response token."""
    base = timings[than].seconds_per_token
    return {name: round(base / own.seconds_per_token, 2) for name, own in timings.items()}


def matmul_peak(size: int = 2048, repeats: int = 5) -> float:
    """FLOP per second of a square product in ``DTYPE`` on this machine, now."""
    matrix = torch.randn(size, size, dtype=DTYPE)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def machine() -> dict[str, Any]:
    """On what, and at which commit, a number was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": PRECISION,
        "commit": commit,
    }


def record(name: str, row: Mapping[str, Any]) -> None:
    """Write ``results/name.PRECISION.json``: the row, and on what it was measured."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.{PRECISION}.json"
    path.write_text(json.dumps({**row, "machine": machine()}, indent=1) + "\n")
    print(json.dumps(row))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
