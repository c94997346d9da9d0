"""The training loop: steps, evaluation, checkpoints, final student.

The trainer names no method. Everything random in a step derives from (seed, step, example), so a
run that was stopped and started again is the run that was not.
"""

import time
from contextlib import nullcontext
from typing import Any

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import Stopped, UserError
from promptkd.objects import has_objects
from promptkd.ranks import Ranks
from promptkd.training.agreement import check_alike, check_seen_alike, check_shared
from promptkd.training.forecast import Schedule
from promptkd.training.identity import AS_IT_WAS, Resuming
from promptkd.training.journal import Journal
from promptkd.training.launch import refuse_unknown_launch, started
from promptkd.training.lock import locked
from promptkd.training.rehearsal import Rehearsal, rehearse
from promptkd.training.roll_call import RollCall
from promptkd.training.run_directory import RunDirectory
from promptkd.training.setup import contents, set_up
from promptkd.training.state import RunState, SourceStates
from promptkd.training.steps_bar import StepsBar
from promptkd.training.stopping import StopRequest
from promptkd.training.tracking import check_trackers
from promptkd.training.training_step import TrainingStep
from promptkd.training.validation import Best, Validator


class Trainer:
    """One run on this rank.

    Args:
        recipe: what to do.
        method: the recipe's method, built.
        resuming: what may differ if the run was begun before, and where it goes on.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """

    def __init__(self, recipe: Recipe, method: Method, resuming: Resuming = AS_IT_WAS):
        refuse_unknown_launch()
        self.method = method
        self.directory = RunDirectory(recipe, method, resuming)
        self.recipe = recipe = self.directory.recipe
        check_trackers(recipe.tracking)
        self.accelerator = started(recipe.tracking, self.directory.path / "tracking")
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.is_main = self.accelerator.is_main_process
        self.journal = Journal(self.directory, self.accelerator)
        self.roll_call = RollCall(self.ranks)
        self.best = Best(recipe)
        self.sources = SourceStates(method, self.ranks)
        self.stop = StopRequest()
        self.step_number = 0
        self.took: dict[str, float] = {}
        with self.roll_call.held():
            check_seen_alike(self.directory.finished, self.directory.path, self.ranks)
        if self.directory.finished:
            if has_objects(recipe):  # whose names don't say what is in them
                self.directory.refuse_others(contents(recipe, method, self.accelerator.device))
            return
        begun = time.perf_counter()
        with self.roll_call.held():
            self.parts = set_up(
                recipe, method, self.accelerator.device, self.ranks, self.journal.say
            )
        self.seconds_loading = time.perf_counter() - begun
        self.validator = Validator.of(self.parts, self.ranks, recipe.evaluation.metric)
        self.take_step = TrainingStep(
            recipe, method, setup=self.parts, sources=self.sources, ranks=self.ranks
        )
        self.state = RunState(self.parts, self.best, self.sources)

    def run(self) -> None:
        """Train to the end, from the latest good checkpoint if there is one.

        Raises:
            UserError: when training can't go on; what was saved stays loadable.
            Stopped: when a signal asked for an end.
        """
        if self.directory.finished:
            self.journal.say(f"{self.directory.path} is finished; nothing to do.")
            self.roll_call.close()
            return
        with self.roll_call.held(), locked(self.directory.path) if self.is_main else nullcontext():
            with self.stop.listening():
                self._resume()
                self._train()
            self._finish()
        self.roll_call.close()

    def rehearse(self) -> Rehearsal:
        """Take the first steps and forget them; see ``api.check``."""
        if self.directory.finished:
            raise UserError(f"{self.directory.path} is finished. Name another output to check.")
        with self.roll_call.held():
            rehearsal = rehearse(
                self.recipe,
                self.parts,
                self.ranks,
                self.state,
                self.take_step,
                self.seconds_loading,
            )
        self.roll_call.close()
        return rehearsal

    def _train(self) -> None:
        max_steps, recipe = self.parts.max_steps, self.recipe
        self.journal.open()
        schedule, say = Schedule.of(recipe, max_steps), self.journal.say if self.is_main else None
        with StepsBar(self.method.name, schedule, done=self.step_number, say=say) as progress:
            if self.step_number == 0:
                self._validate()
                progress.evaluated()
            while self.step_number < max_steps:
                self._stop_if_asked()
                progress.stepped(self._step())
                last = self.step_number == max_steps
                if last or self._due(recipe.evaluation.every_steps):
                    self._validate()
                if self._due(recipe.evaluation.exposure_bias_every_steps):
                    self._measure_exposure_bias()
                if last or self._due(recipe.checkpoints.every_steps):
                    self._save_checkpoint()
            self.took = progress.took()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step_number > 0 and self.step_number % every == 0

    def _step(self) -> dict[str, Any]:
        self.roll_call.phase = f"step {self.step_number + 1}"
        with self.directory.way_back(self.step_number):
            row = self.take_step(self.step_number)
        self.step_number += 1
        self.journal.add(row)
        return row

    def _stop_if_asked(self) -> None:
        """Between two steps; what was learnt is saved before."""
        received = self.stop.agreed(self.ranks)
        if received:
            if self.step_number and not self._due(self.recipe.checkpoints.every_steps):
                self._save_checkpoint()
            done, again = f"step {self.step_number} of {self.parts.max_steps}", "the same command"
            if self.directory.restarts:
                again += " without --restart-from"
            raise Stopped(f"Stopped by {received.name} after {done}; {again} goes on.", received)

    def _validate(self) -> None:
        """Score the student on the validation data, if there is any; keep it if it is the best."""
        if self.validator is None:
            return
        self.roll_call.phase = f"the evaluation after step {self.step_number}"
        with self.directory.way_back(self.step_number):
            found = self.validator.score(self.step_number)
        if "cross_entropy" in found.scores:
            self.sources.observe(found.scores["cross_entropy"])
        self.journal.add_scores(found)
        if self.best.offer(found):
            self._save_student(found.scores)

    def _measure_exposure_bias(self) -> None:
        assert self.validator, "refused before the first step"
        with self.directory.way_back(self.step_number):
            curve = self.validator.exposure_curve()
        self.journal.add({"step": self.step_number, "exposure_bias": curve.to_dict()})

    def _save_student(self, scores: dict[str, float]) -> None:
        with self.parts.models.saved_student() as module:
            if self.is_main:
                self.directory.save_student(self.parts, module, self.step_number, scores)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        self.roll_call.phase = f"the checkpoint of step {self.step_number}"
        checkpoint = self.state.checkpoint(self.step_number)
        if self.is_main:
            self.directory.save_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        directory, contents = self.directory, self.parts.contents()
        check_shared(directory.path, self.ranks, self.roll_call.patience)
        saved, complaints = directory.load_checkpoint()
        for complaint in complaints:
            self.journal.say(f"warning: {complaint}")
        if saved:
            self.state.load(saved)
            self.step_number = saved.step
            self.journal.say(f"resuming {directory.path} after step {saved.step}")
        found = contents | {"newest checkpoint": f"step {self.step_number}"}
        check_alike(self.recipe, self.method, found, self.ranks)
        for change in directory.changes:
            self.journal.say(f"from here on: {change}")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            directory.claim(contents, self.parts.about, self.step_number)
        self.journal.go_on(self.step_number if saved else None)
        if directory.restarts and saved:
            self.best.forget()
            self._save_checkpoint()

    def _finish(self) -> None:
        if not self.best.found:
            self._save_student({})
        if self.is_main:
            summary = self.parts.summary() | self.took | {"best": self.best.found or None}
            self.directory.finish(summary)
        self.accelerator.wait_for_everyone()
        self.journal.close()
        self.journal.say(f"finished: {self.directory.path}")
