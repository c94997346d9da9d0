"""The training loop: steps, evaluation, checkpoints, final student.

The trainer names no method. Everything random in a step derives from (seed, step, example), so a
run that was killed and started again is the run that was not.
"""

import time
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.data import batch_of_step
from promptkd.errors import UserError
from promptkd.ranks import Ranks
from promptkd.training.rehearsal import rehearse
from promptkd.training.run_directory import RunDirectory
from promptkd.training.schedules import learning_rate
from promptkd.training.setup import set_up
from promptkd.training.state import RunState, SourceStates
from promptkd.training.tracking import check_trackers, describe_step
from promptkd.training.validation import Best, Validator
from promptkd.training.warnings import Watch

NUM_SAMPLES = 4
"""Responses of each evaluation that are kept in samples.jsonl."""


class Trainer:
    """One run on this rank.

    Args:
        recipe: what to do.
        method: the recipe's method, built.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """

    def __init__(self, recipe: Recipe, method: Method):
        self.recipe = recipe
        self.method = method
        self.directory = RunDirectory(recipe, method)
        check_trackers(recipe.tracking)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(recipe.tracking) or None,
            project_dir=str(self.directory.path / "tracking"),
        )
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.is_main = self.accelerator.is_main_process
        self.best = Best(recipe)
        self.sources = SourceStates(method, self.ranks)
        self.watch = Watch()
        self.step_number = 0
        if not self.directory.finished:
            self.parts = set_up(recipe, method, self.accelerator.device, self.ranks, self.say)
            metric = recipe.evaluation.metric
            self.validator = (
                Validator(self.parts, self.ranks, metric) if self.parts.validation else None
            )
            self.state = RunState(self.parts, self.best, self.sources)

    def say(self, sentence: str) -> None:
        if self.is_main:
            tqdm.write(sentence)

    def run(self) -> None:
        """Train to the end, from the latest good checkpoint if there is one.

        Raises:
            UserError: when training can't go on; what was saved stays loadable.
        """
        if self.directory.finished:
            self.say(f"{self.directory.path} is finished; nothing to do.")
            return
        if self.is_main:
            self.directory.claim(self.parts.contents(), self.parts.date)
        self._resume()
        if self.recipe.tracking:
            self.accelerator.init_trackers("promptkd")
        max_steps, every = self.parts.max_steps, self.recipe.evaluation.every_steps
        if self.step_number == 0:
            self._validate()
        shown = {"unit": "step", "desc": self.method.name, "disable": not self.is_main}
        with tqdm(total=max_steps, initial=self.step_number, **shown) as progress:
            while self.step_number < max_steps:
                row = self._take_step(self.step_number)
                self.step_number += 1
                self._log(row)
                progress.update()
                length = f"{row['response_length']:.0f}"
                progress.set_postfix(loss=f"{row['loss']:.3f}", length=length)
                last = self.step_number == max_steps
                if last or self._due(every):
                    self._validate()
                if self._due(self.recipe.evaluation.exposure_bias_every_steps):
                    self._measure_exposure_bias()
                if last or self._due(self.recipe.checkpoints.every_steps):
                    self._save_checkpoint()
        self._finish()

    def rehearse(self) -> dict[str, Any]:
        """Take the first steps and forget them; see ``api.check``."""
        if self.directory.finished:
            raise UserError(f"{self.directory.path} is finished. Name another output to check.")
        return rehearse(self.recipe, self.parts, self.ranks, self.state, self._take_step)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step_number % every == 0

    def _take_step(self, step: int) -> dict[str, Any]:
        """One optimizer step; its line of metrics.jsonl."""
        started = time.perf_counter()
        optimization, parts = self.recipe.optimization, self.parts
        for learner in parts.step.learners:
            learner.set_rate(learning_rate(learner.base_rate, step, parts.max_steps, optimization))
        batch = batch_of_step(
            parts.data,
            step,
            optimization.global_batch_size,
            self.recipe.seed,
            self.ranks.rank,
            self.ranks.number,
        )
        writers = parts.authors.writers(step, parts.max_steps)
        rollouts = [
            term.rollouts.write(batch, writers, state)
            for term, state in zip(self.method.terms, self.sources.own, strict=True)
        ]
        written = time.perf_counter()
        metrics = parts.step(rollouts, step, parts.max_steps)
        if parts.teacher:
            parts.teacher.observe(metrics.loss, (step + 1) / parts.max_steps)
        row = describe_step(step, rollouts, metrics, parts.stop, self.ranks)
        row["learning_rate"] = parts.step.student_learner.rate
        row["seconds_writing"] = written - started
        row["seconds_learning"] = time.perf_counter() - written
        return row

    def _log(self, row: dict[str, Any]) -> None:
        if self.is_main:
            self.directory.metrics.append([row])
            for finding in self.watch.add(row):
                self.say(str(finding))
        if self.recipe.tracking:
            scores = {f"eval_{name}": value for name, value in row.get("evaluation", {}).items()}
            own = row.keys() - {"evaluation", "exposure_bias"}
            numbers = {name: row[name] for name in row if name in own}
            self.accelerator.log(numbers | scores, step=row["step"])

    def _validate(self) -> None:
        """Score the student on the validation data, if there is any; keep it if it is the best."""
        if self.validator is None:
            return
        found = self.validator.score(self.step_number)
        if "cross_entropy" in found.scores:
            self.sources.observe(found.scores["cross_entropy"])
        self._log({"step": found.step, "evaluation": found.scores})
        said = ", ".join(f"{name} {value:.3f}" for name, value in found.scores.items())
        self.say(f"step {found.step}: {said}")
        if self.is_main:
            shown = found.predictions[:NUM_SAMPLES]
            self.directory.samples.append({"step": found.step, **p.to_row()} for p in shown)
        if self.best.offer(found):
            self._save_student(found.scores)

    def _measure_exposure_bias(self) -> None:
        assert self.validator, "refused before the first step"
        curve = self.validator.exposure_curve()
        self._log({"step": self.step_number, "exposure_bias": curve.to_dict()})

    def _save_student(self, scores: dict[str, float]) -> None:
        if self.is_main:
            parts = self.parts
            self.directory.save_student(
                parts.student,
                parts.tokenizer,
                parts.teacher,
                self.step_number,
                scores,
                parts.stop,
            )
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        checkpoint = self.state.checkpoint(self.step_number)
        if self.is_main:
            self.directory.save_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        saved, complaints = self.directory.load_checkpoint()
        for complaint in complaints:
            self.say(f"warning: {complaint}")
        if complaints and saved is None:
            self.say("warning: no checkpoint is left; starting from the beginning.")
        if saved:
            self.state.load(saved)
            self.step_number = saved.step
            self.say(f"resuming {self.directory.path} after step {saved.step}")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.directory.rewind(saved.step if saved else -1)
            self.watch = Watch(self.directory.metrics.read() if saved else ())

    def _finish(self) -> None:
        if not self.best.found:
            self._save_student({})
        if self.is_main:
            self.directory.finish(self.parts.summary() | {"best": self.best.found or None})
        self.accelerator.wait_for_everyone()
        if self.recipe.tracking:
            self.accelerator.end_training()
        self.say(f"finished: {self.directory.path}")
