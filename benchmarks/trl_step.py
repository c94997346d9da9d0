"""One optimizer step of on-policy distillation: our gkd against TRL's DistillationTrainer.

Reverse KL, the same models, requests, batch, response length and sampling settings; TRL's own
defaults otherwise (gradient checkpointing on), and without it; the precision is the same.
TRL's loop calls ours, which have a process each, after each of its steps, so the sides alternate.
Needs trl==1.16.0; with vLLM, a vLLM row too. Writes results/trl_step.*.json.
"""

import importlib.util
import statistics
import tempfile
import time
from functools import partial
from typing import Any

from datasets import Dataset
from setting import BF16, OurStep, Setting, Side, matmul_peak, own_process, record, setting
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl import __version__ as trl_version

REPEATS = 4  # the first one warms up


class Clock(TrainerCallback):
    """Takes the seconds of TRL's steps, and hands over to the other side after each."""

    def __init__(self, afterwards):
        self.seconds: list[float] = []
        self.afterwards = afterwards

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        print(f"trl: {self.seconds[-1]:.2f} s", flush=True)
        self.afterwards(state.global_step)


def trl_trainer(
    given: Setting, *, checkpointing: bool = True, steps: int = REPEATS, callbacks: Any = ()
) -> DistillationTrainer:
    """Their trainer on our requests, which it tokenizes to the same ids."""
    texts = [given.tokenizer.decode(list(request)) for request in given.requests]
    for text, request in zip(texts, given.requests, strict=True):
        assert tuple(given.tokenizer(text).input_ids) == request
    forced = {"min_new_tokens": given.num_new} if given.forced else None
    return DistillationTrainer(
        model=given.student,
        teacher_model=given.teacher,
        args=DistillationConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(given.requests),
            max_completion_length=given.num_new,
            generation_kwargs=forced,
            max_steps=steps,
            gradient_checkpointing=checkpointing,
            bf16=BF16,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=given.tokenizer,
        callbacks=list(callbacks),
    )


def our_step(name: str) -> dict[str, Side]:
    return {name: OurStep(setting(), "gkd", vllm=name == "gkd, vllm")}


def main() -> None:
    setting()  # the models are written once, before anybody reads them
    names = ["gkd", *(["gkd, vllm"] if importlib.util.find_spec("vllm") else [])]
    ours: dict[str, Side] = {}
    for name in names:
        ours |= own_process(partial(our_step, name), name)
    rows = {}
    for name, checkpointing in (("trl", True), ("trl, no gradient checkpointing", False)):
        seconds: dict[str, list[float]] = {side: [] for side in ours}

        def turn(number: int, seconds: dict[str, list[float]] = seconds) -> None:
            for side, step in ours.items():
                started = time.perf_counter()
                step(number)
                seconds[side].append(time.perf_counter() - started)
                print(f"{side}: {seconds[side][-1]:.2f} s", flush=True)

        clock = Clock(turn)
        trl_trainer(setting(), checkpointing=checkpointing, callbacks=[clock]).train()
        seconds[name] = clock.seconds
        medians = {side: statistics.median(own[1:]) for side, own in seconds.items()}
        rows[name] = {
            "seconds": {side: [round(s, 3) for s in own] for side, own in seconds.items()},
            "times_faster": {side: round(medians[name] / medians[side], 2) for side in medians},
        }
        record(
            "trl_step",
            {"trl": trl_version, "new_tokens": 128, "matmul_peak": matmul_peak(), "against": rows},
        )


if __name__ == "__main__":
    main()
