"""The loop: take a run's steps, keep everything, end with a student.

The trainer names no method. Everything random in a step derives from (seed, step, example), so a
run that was killed and started again is the run that was not.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from tqdm import tqdm

from promptkd.adapters import trained_state
from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.data import Dataset, batch_of_step
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import predict, score
from promptkd.evaluation.exposure_bias import curve_in_training, write_responses
from promptkd.evaluation.predictions import summarise
from promptkd.files import out_of_space
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.models.loading import num_parameters
from promptkd.rollouts import Rollout, reference_rollouts
from promptkd.token_losses import LossSums, loss_sums
from promptkd.training.checkpoints import Checkpoint
from promptkd.training.run_directory import RunDirectory
from promptkd.training.schedules import learning_rate
from promptkd.training.setup import assemble
from promptkd.training.step import StepMetrics

VALIDATION_SEED = 1
SMALLER_IS_BETTER = {"reverse_kl_to_teacher", "validation_loss"}


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held so far: of the card's memory if it works on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
        missing = set(recipe.tracking) - {str(tracker) for tracker in get_available_trackers()}
        if missing:
            raise UserError(
                f"tracking asks for {', '.join(sorted(missing))}, which is not installed. "
                f"Run: pip install {' '.join(sorted(missing))}"
            )
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            log_with=list(recipe.tracking) or None,
            project_dir=str(self.directory.path / "tracking"),
        )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.best: dict[str, Any] = {}
        self.source_states: list[dict[str, Any]] = [{} for _ in method.terms]
        self.teacher_responses: list[list[Rollout]] = []
        self.step_number = 0
        if not self.directory.finished:
            self.parts = assemble(
                recipe,
                method,
                self.device,
                self.accelerator.num_processes,
                self._sum_over_ranks,
                self.say,
            )

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
        try:
            self._train()
        except OSError as error:
            if out_of_space(error):
                raise UserError(
                    f"No space left in {self.directory.path}. The last checkpoint is intact: free "
                    "some space and run the same command again."
                ) from None
            raise

    def rehearse(self) -> dict[str, Any]:
        """Take the first step and forget it; see ``api.check``."""
        if self.directory.finished:
            raise UserError(f"{self.directory.path} is finished. Name another output to check.")
        first = self._take_step(0)
        return {"steps": self.parts.max_steps, "first": first, "preflight": self.parts.found}

    def _train(self) -> None:
        if self.is_main:
            self.directory.claim()
        self._resume()
        if self.recipe.tracking:
            self.accelerator.init_trackers("promptkd")
        max_steps = self.parts.max_steps
        if self.step_number == 0 and self.parts.validation:
            self._evaluate()
        progress = tqdm(
            total=max_steps,
            initial=self.step_number,
            unit="step",
            desc=self.method.name,
            disable=not self.is_main,
        )
        while self.step_number < max_steps:
            row = self._take_step(self.step_number)
            self.step_number += 1
            self._log(row)
            progress.update()
            progress.set_postfix(loss=f"{row['loss']:.3f}", length=f"{row['response_length']:.0f}")
            last = self.step_number == max_steps
            if self.parts.validation and (last or self._due(self.recipe.evaluation.every_steps)):
                self._evaluate()
            if self._due(self.recipe.evaluation.exposure_bias_every_steps):
                self._measure_exposure_bias()
            if last or self._due(self.recipe.checkpoints.every_steps):
                self._save_checkpoint()
        progress.close()
        self._finish()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step_number % every == 0

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _take_step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        optimization, parts = self.recipe.optimization, self.parts
        for learner, base in (
            (parts.step.student_learner, optimization.learning_rate),
            (parts.step.teacher_learner, optimization.teacher_learning_rate),
        ):
            for group in learner.optimizer.param_groups if learner else ():
                group["lr"] = learning_rate(base, step, parts.max_steps, optimization)
        batch = batch_of_step(
            parts.data,
            step,
            optimization.global_batch_size,
            self.recipe.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        writers = parts.authors.writers(step, parts.max_steps)
        rollouts = [
            term.rollouts.write(batch, writers, state)
            for term, state in zip(self.method.terms, self.source_states, strict=True)
        ]
        written = time.perf_counter()
        metrics = parts.step(rollouts, step, parts.max_steps)
        if parts.teacher:
            parts.teacher.observe(metrics.loss, (step + 1) / parts.max_steps)
        row = self._describe(step, rollouts, metrics)
        row["seconds_writing"] = written - started
        row["seconds_learning"] = time.perf_counter() - written
        row |= {f"seconds_{phase}": took for phase, took in metrics.cost.seconds.items()}
        row["flops"] = sum(metrics.cost.flops.values())
        row["peak_memory"] = peak_memory(self.device)
        return row

    def _describe(
        self, step: int, rollouts: Sequence[Sequence[Rollout]], metrics: StepMetrics
    ) -> dict[str, Any]:
        """One line of metrics.jsonl; means are over all response tokens of all ranks."""
        flat = [rollout for written in rollouts for rollout in written]
        stop = set(self.parts.stop)
        own = [rollout for rollout in flat if rollout.author == "student"]
        counts = [
            len(flat),
            sum(len(r.response_ids) for r in flat),
            sum(r.response_ids[-1] in stop for r in flat),
            sum(not set(r.response_ids) - stop for r in own),
            len(own),
        ]
        summed = self._sum_over_ranks(torch.tensor(counts, dtype=torch.float64).to(self.device))
        num_rollouts, num_tokens, num_ended, num_empty, num_own = summed.tolist()
        if num_own and num_empty == num_own:
            self.say(
                f"warning: step {step + 1}: all {int(num_empty)} responses of the student are "
                "empty (it stops at once). It learns from the stop token alone: warm it up with "
                "the method kd first, or check the template."
            )
        row: dict[str, Any] = {
            "step": step + 1,
            "loss": metrics.loss,
            "response_length": num_tokens / num_rollouts,
            "share_ended": num_ended / num_rollouts,
            "num_empty": int(num_empty),
            "student_share": num_own / num_rollouts,
            "num_tokens": int(num_tokens),
            "padding_share": metrics.padding_share,
            "learning_rate": self.parts.step.student_learner.optimizer.param_groups[0]["lr"],
        }
        for name, key in (
            ("towards_student", "kl_teacher_student"),
            ("towards_itself", "kl_teacher_plain"),
        ):
            if name in metrics.nats:
                row[key] = metrics.teacher_mean(name)
        return row | {f"gradient_norm_{who}": n for who, n in metrics.gradient_norms.items()}

    def _log(self, row: dict[str, Any]) -> None:
        if self.is_main:
            self.directory.metrics.append([row])
        if self.recipe.tracking:
            scores = {f"eval_{name}": value for name, value in row.get("evaluation", {}).items()}
            own = row.keys() - {"evaluation", "exposure_bias"}
            numbers = {name: row[name] for name in row if name in own}
            self.accelerator.log(numbers | scores, step=row["step"])

    def _evaluate(self) -> None:
        """Score the student on the validation data; keep it if it is the best so far."""
        parts, step = self.parts, self.step_number
        assert parts.validation is not None
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = Dataset(parts.validation.examples[rank::num_ranks])
        written = predict(parts.engine, share, parts.decoding, VALIDATION_SEED)
        budget = parts.step.micro_batch_tokens
        teacher = parts.plain_teacher if parts.comparable else None
        own = loss_sums(written, parts.student, teacher, budget)
        given = LossSums()
        if parts.validation.has_references:
            references = reference_rollouts(share.examples)
            given = loss_sums(references, parts.student, None, budget)
        sums = [own.reverse_kl, own.count, given.cross_entropy, given.count]
        totals = self._sum_over_ranks(torch.tensor(sums, dtype=torch.float64).to(self.device))
        reverse_kl, num_tokens, cross_entropy, num_given = totals.tolist()
        predictions = score(written, share, parts.tokenizer, parts.stop, VALIDATION_SEED)
        if num_ranks > 1:
            predictions = gather_object(predictions)
        scores = {name: value["mean"] for name, value in summarise(predictions).items()}
        if teacher:
            scores["reverse_kl_to_teacher"] = reverse_kl / num_tokens
        if num_given:
            scores["validation_loss"] = cross_entropy / num_given
            for term, state in zip(self.method.terms, self.source_states, strict=True):
                term.rollouts.observe(scores["validation_loss"], state)
        self._log({"step": step, "evaluation": scores})
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.say(f"step {step}: {said}")
        if self.is_main:
            chosen = sorted(predictions, key=lambda prediction: prediction.index)[:4]
            self.directory.samples.append({"step": step, **asdict(p)} for p in chosen)
        value = scores[self.recipe.evaluation.metric]
        sign = -1 if self.recipe.evaluation.metric in SMALLER_IS_BETTER else 1
        if step > 0 and (not self.best or sign * value > sign * self.best["value"]):
            self.best = {"step": step, "value": value, "scores": scores}
            self._save_student(scores)

    def _measure_exposure_bias(self) -> None:
        """A point of the paper's Figure 3(b), on the validation data."""
        parts = self.parts
        assert parts.validation, "refused before the first step"
        assert parts.plain_teacher, "refused before the first step"
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        share, seeds = Dataset(parts.validation.examples[rank::num_ranks]), (VALIDATION_SEED,)
        if not self.teacher_responses:  # the teacher doesn't change
            engine = TransformersEngine(parts.plain_teacher, parts.stop)
            self.teacher_responses = write_responses(engine, share, parts.decoding, seeds)
        curve = curve_in_training(
            parts.student,
            parts.plain_teacher,
            parts.engine,
            self.teacher_responses,
            share,
            parts.decoding,
            seeds=seeds,
            micro_batch_tokens=parts.step.micro_batch_tokens,
            gather=gather_object if num_ranks > 1 else list,
        )
        self._log({"step": self.step_number, "exposure_bias": curve.to_dict()})

    def _save_student(self, scores: dict[str, float]) -> None:
        if self.is_main:
            self.directory.save_student(
                self.parts.student,
                self.parts.tokenizer,
                self.parts.teacher,
                self.step_number,
                scores,
            )
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        step, teacher = self.parts.step, self.parts.teacher
        sources = [self.source_states]  # of every rank: each keeps what it wrote itself
        if self.accelerator.num_processes > 1:
            sources = gather_object(sources)
        if self.is_main:
            tensors: dict[str, Any] = {
                "student": trained_state(self.parts.student.module),
                "student_optimizer": step.student_learner.optimizer.state_dict(),
            }
            if teacher:
                tensors["teacher"] = teacher.state_dict()
            if step.teacher_learner:
                tensors["teacher_optimizer"] = step.teacher_learner.optimizer.state_dict()
            progress = {
                "best": self.best,
                "sources": sources,
                "micro_batch_tokens": step.micro_batch_tokens,  # other cuts, other last digits
            }
            self.directory.save_checkpoint(Checkpoint(self.step_number, tensors, progress))
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        saved, complaints = self.directory.load_checkpoint()
        for complaint in complaints:
            self.say(f"warning: {complaint}")
        if complaints and saved is None:
            self.say("warning: no checkpoint is left; starting from the beginning.")
        step, teacher = self.parts.step, self.parts.teacher
        if saved:
            own = self.parts.student.module.state_dict()
            self.parts.student.module.load_state_dict(own | saved.tensors["student"])
            step.student_learner.optimizer.load_state_dict(saved.tensors["student_optimizer"])
            if teacher:
                teacher.load_state_dict(saved.tensors["teacher"])
            if step.teacher_learner:
                step.teacher_learner.optimizer.load_state_dict(saved.tensors["teacher_optimizer"])
            step.micro_batch_tokens = saved.progress["micro_batch_tokens"]
            self.best = saved.progress["best"]
            self.source_states = self._own_sources(saved.progress["sources"])
            self.step_number = saved.step
            self.say(f"resuming {self.directory.path} after step {saved.step}")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.directory.rewind(saved.step if saved else -1)

    def _own_sources(self, sources: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """This rank's share of what the sources remembered."""
        num_ranks = self.accelerator.num_processes
        if len(sources) == num_ranks:
            return sources[self.accelerator.process_index]
        if not any(state for states in sources for state in states):
            return self.source_states
        raise UserError(
            f"{self.directory.path} was trained by {len(sources)} processes, each of which kept "
            f"responses of its own; now there are {num_ranks}. Start {len(sources)} again."
        )

    def _finish(self) -> None:
        if not self.best:
            self._save_student({})
        if self.is_main:
            teacher = self.parts.plain_teacher
            self.directory.finish(
                {
                    "steps": self.parts.max_steps,
                    "best": self.best or None,
                    "preflight": self.parts.found,
                    "student_parameters": num_parameters(self.parts.student.module),
                    "teacher_parameters": num_parameters(teacher.module) if teacher else None,
                }
            )
        self.accelerator.wait_for_everyone()
        if self.recipe.tracking:
            self.accelerator.end_training()
        self.say(f"finished: {self.directory.path}")
