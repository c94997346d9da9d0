"""The first steps of a run, taken and forgotten: what it will look like, take and leave."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from promptkd.bars import progress_bar
from promptkd.config import Recipe
from promptkd.data import Dataset
from promptkd.findings import Finding
from promptkd.models.loading import dtype_of
from promptkd.models.sizes import num_parameters
from promptkd.numbers import duration
from promptkd.ranks import Ranks
from promptkd.records import Record
from promptkd.training.checkpoints import save_checkpoint
from promptkd.training.forecast import Measured, Schedule, forecast
from promptkd.training.setup import Setup
from promptkd.training.state import RunState
from promptkd.training.tracking import peak_memory
from promptkd.training.validation import Validator

LATER_STEPS, REUSING_STEPS = 2, 4
"""Steps after the first that are timed; a method that reuses rollouts generates in one of four."""
ENOUGH_SECONDS = 60.0
"""No further step begins after these."""
EVALUATED = 32
"""Validation requests that are timed; what the rest takes is in proportion."""


class Rehearsal(Record):
    """What ``api.check`` returns."""

    def lines(self) -> Iterator[str]:
        """Example, cost of a step, and the forecast."""
        first, expected, measured = self["first"], self["forecast"], self["measured"]
        example = self["example"]
        tokens = example["response_tokens"]
        response = "generated while training" if tokens is None else f"|{'|'.join(tokens)}|"
        yield f"the first request: {example['request']!r}; its response, by tokens: {response!r}"
        if example["teacher_request"] is not None:
            yield f"what the teacher reads of it: {example['teacher_request']!r}"
        yield (
            f"one step: loss {first['loss']:.3f} nats per token, {first['response_length']:.0f} "
            f"tokens per response, {100 * first['share_ended']:.0f} % ended; the first took "
            f"{measured['seconds_start']:.1f} s, later ones {measured['seconds_step']:.1f} s"
        )
        yield f"memory: {self.peak_memory / 1e9:.1f} GB at most so far"
        yield (
            f"disk: checkpoints and students take {expected['bytes_disk'] / 1e9:.2f} GB, "
            f"{self.bytes_free / 1e9:.1f} GB are free"
        )
        if expected["bytes_disk"] > self.bytes_free:
            yield str(Finding("PK208", "the run needs more disk than is free."))
        yield (
            f"the run: {self.steps} steps of {self.requests_per_step} requests "
            f"({self.epochs:.2g} epochs), about {duration(expected['seconds'])} (loading "
            f"{duration(expected['seconds_loading'])}, steps "
            f"{duration(expected['seconds_steps'])}, evaluations "
            f"{duration(expected['seconds_evaluations'])}, saving "
            f"{duration(expected['seconds_saving'])}), into {self.output}"
        )


def rehearse(
    recipe: Recipe,
    setup: Setup,
    ranks: Ranks,
    state: RunState,
    take_step: Callable[[int], dict[str, Any]],
    seconds_loading: float,
) -> Rehearsal:
    """Measure a few steps, a part of an evaluation and a checkpoint, and forget them.

    ``seconds_loading`` are what ``setup`` took; see ``api.check``.
    """
    row, seconds_start, seconds_later = _first_steps(setup.max_steps, take_step, state, ranks)
    seconds_evaluation = _time_evaluation(recipe, setup, ranks)
    seconds_checkpoint, bytes_checkpoint = _time_checkpoint(recipe, state)
    student, batch = setup.models.student.module, recipe.optimization.global_batch_size
    measured = Measured(
        seconds_start=seconds_start,
        seconds_step=seconds_later,
        seconds_evaluation=seconds_evaluation,
        seconds_checkpoint=seconds_checkpoint,
        bytes_checkpoint=bytes_checkpoint,
        bytes_student=num_parameters(student) * dtype_of(recipe.student.model).itemsize,
        seconds_loading=seconds_loading,
    )
    return Rehearsal(
        steps=setup.max_steps,
        epochs=setup.max_steps * batch / len(setup.requests.data),
        requests_per_step=batch,
        output=recipe.output,
        first=row,
        preflight=setup.found,
        example=_example(setup),
        measured=asdict(measured),
        forecast=asdict(forecast(measured, Schedule.of(recipe, setup.max_steps))),
        peak_memory=peak_memory(setup.models.student.device),
        bytes_free=shutil.disk_usage(_existing(Path(recipe.output))).free,
    )


def _first_steps(
    max_steps: int, take_step: Callable[[int], dict[str, Any]], state: RunState, ranks: Ranks
) -> tuple[dict[str, Any], float, float]:
    """The first step's line, its seconds, and those of a later one."""
    shown = {"desc": "first steps", "unit": "step", "disable": ranks.rank > 0}
    with progress_bar(total=min(1 + LATER_STEPS, max_steps), **shown) as bar:
        started = time.perf_counter()
        row, taken = take_step(0), 1
        bar.update()
        first = time.perf_counter()
        remembered = state.progress["sources"].state_dict()
        later = REUSING_STEPS if any(map(any, remembered)) else LATER_STEPS
        bar.total = at_most = min(1 + later, max_steps)
        while taken < at_most and (taken == 1 or time.perf_counter() - first < ENOUGH_SECONDS):
            take_step(taken)
            taken += 1
            bar.update()
    return row, first - started, (time.perf_counter() - first) / max(1, taken - 1)


def _time_evaluation(recipe: Recipe, setup: Setup, ranks: Ranks) -> float:
    if setup.requests.validation is None:
        return 0.0
    examples = setup.requests.validation.examples
    some = replace(setup.requests, validation=Dataset(examples[: EVALUATED * ranks.number]))
    validator = Validator(replace(setup, requests=some), ranks, recipe.evaluation.metric)
    started = time.perf_counter()
    validator.score(0)
    share = len(examples) / min(len(examples), EVALUATED * ranks.number)
    return share * (time.perf_counter() - started)


def _time_checkpoint(recipe: Recipe, state: RunState) -> tuple[float, int]:
    """Seconds and bytes, beside the run's directory, where there must be space for it anyway."""
    started = time.perf_counter()
    checkpoint = state.checkpoint(1)
    with tempfile.TemporaryDirectory(
        dir=_existing(Path(recipe.output)), prefix=".rehearsal-"
    ) as place:
        final = save_checkpoint(Path(place), checkpoint, keep=1)
        seconds = time.perf_counter() - started
        return seconds, sum(path.stat().st_size for path in final.iterdir())


def _existing(path: Path) -> Path:
    """The nearest directory above (not the run's own) that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _example(setup: Setup) -> dict[str, Any]:
    """The first row as the models see it; without a reference the response is generated."""
    tokenizer, example = setup.requests.tokenizer, setup.requests.data.examples[0]
    response, of_teacher = example.response_ids, example.teacher_request_ids
    return {
        "request": tokenizer.decode(example.request_ids),
        "teacher_request": of_teacher and tokenizer.decode(of_teacher),
        "response_tokens": None if response is None else [tokenizer.decode([i]) for i in response],
    }
