"""The loop: prepare a run, take its steps, keep everything, end with a student.

The trainer names no method. Everything random in a step derives from (seed, step, example), so a
run that was killed and started again is the run that was not.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from promptkd import checkpoints, preflight
from promptkd.cache import ResponseCache, fingerprint
from promptkd.checkpoints import Checkpoint
from promptkd.config import Recipe
from promptkd.data import (
    Dataset,
    EncodedExample,
    Encoder,
    batch_of_step,
    evaluation_set,
    read_examples,
    steps_of_epochs,
    training_set,
)
from promptkd.engines import CoAuthor, Decoding, TransformersEngine
from promptkd.errors import UserError
from promptkd.evaluation import nats_per_token, predict, score, summarise
from promptkd.methods import Method
from promptkd.models import (
    LanguageModel,
    compute_dtype,
    load_model,
    load_tokenizer,
    native_bf16,
    num_parameters,
    same_tokenizer,
    shared_vocabulary,
    stop_ids,
)
from promptkd.rollouts import Rollout, Writers, reference_rollouts
from promptkd.schedules import learning_rate
from promptkd.step import Learner, Step, StepMetrics
from promptkd.teachers import Teacher
from promptkd.tracking import JsonLines, environment

VALIDATION_SEED = 1
SMALLER_IS_BETTER = {"reverse_kl_to_teacher", "validation_loss"}


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
        self.output = Path(recipe.output)
        cpu = not torch.cuda.is_available()
        trackers = list(recipe.tracking)
        self.accelerator = Accelerator(
            cpu=cpu, log_with=trackers or None, project_dir=str(self.output / "tracking")
        )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.dtype = compute_dtype(recipe.precision, self.device)
        self.metrics = JsonLines(self.output / "metrics.jsonl")
        self.samples = JsonLines(self.output / "samples.jsonl")
        self.best: dict[str, Any] = {}
        self.source_states: list[dict[str, Any]] = [{} for _ in method.terms]
        self.step_number = 0
        self._claim_output()
        self._load()

    def say(self, sentence: str) -> None:
        if self.is_main:
            tqdm.write(sentence)

    # -- preparation

    def _identity(self) -> dict[str, Any]:
        recipe = self.recipe.to_dict()
        for key in ("output", "tracking"):
            recipe.pop(key, None)
        return {"recipe": recipe, "method": repr(self.method)}

    def _claim_output(self) -> None:
        """Make the run directory, or prove that it is this recipe's."""
        path = self.output / "environment.json"
        if path.exists():
            recorded = json.loads(path.read_text())["identity"]
            different = _differences(recorded, self._identity())
            if different:
                raise UserError(
                    f"{self.output} belongs to a run of a different recipe (different: "
                    f"{', '.join(different)}). Choose another output, or remove that directory."
                )
        elif self.output.exists() and any(self.output.iterdir()):
            raise UserError(
                f"{self.output} exists and is not a run of promptkd. Choose another output."
            )
        self.accelerator.wait_for_everyone()
        if self.is_main and not path.exists():
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "recipe.yaml").write_text(self.recipe.to_yaml())
            record = {"identity": self._identity(), "environment": environment()}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=2))
            partial.rename(path)

    @property
    def finished(self) -> bool:
        return (self.output / "summary.json").exists()

    def _load(self) -> None:
        recipe, method = self.recipe, self.method
        if recipe.precision == "bf16" and not native_bf16(self.device):
            self.say(
                "warning: precision is bf16, but this processor multiplies bf16 by emulation, "
                "about 10 times slower than fp32; precision: auto avoids that"
            )
        self.tokenizer = load_tokenizer(recipe.student.model)
        self.encoder = Encoder(
            self.tokenizer, recipe.data.template, recipe.data.max_request_tokens,
            recipe.data.max_response_tokens, self.tokenizer.eos_token_id,
        )  # fmt: skip
        self.examples = read_examples(recipe.data.train)
        self.data = training_set(self.examples, self.encoder)
        self.validation: Dataset | None = None
        if recipe.data.validation:
            held_out = read_examples(recipe.data.validation)[: recipe.evaluation.num_examples]
            self.validation = evaluation_set(held_out, self.encoder)
        preflight.check_data(
            method, self.data, self.validation, recipe.evaluation.metric, recipe.teacher is not None
        )
        student = load_model(recipe.student.model, torch.float32)
        teacher = None
        if recipe.teacher and (method.needs_teacher or self.validation):
            teacher = load_model(recipe.teacher.model, self.dtype)
        self._bind(student, teacher)
        names = (recipe.student.model, recipe.teacher.model if recipe.teacher else "")
        self.found = preflight.check_models(
            self.student, self.teacher, self.tokenizer, self.encoder, self.data, names,
            method.adaptation is not None, self.say,
        )  # fmt: skip
        self._plan()
        self.say(f"training data: {self.data.summary()}")
        if self.validation:
            self.say(f"validation data: {self.validation.summary()}")

    def _bind(self, student: Any, teacher: Any) -> None:
        """Put the models together with their vocabularies, teacher policy and engines."""
        recipe, method = self.recipe, self.method
        vocabulary = student.get_input_embeddings().weight.shape[0]
        self.plain_teacher: LanguageModel | None = None
        self.teacher: Teacher | None = None
        if teacher is not None:
            assert recipe.teacher is not None
            teacher_tokenizer = load_tokenizer(recipe.teacher.model)
            self.teacher_tokenizer = teacher_tokenizer
            own = teacher.get_input_embeddings().weight.shape[0]
            if method.compares_tokens or same_tokenizer(self.tokenizer, teacher_tokenizer):
                vocabulary = own = shared_vocabulary(
                    self.tokenizer, teacher_tokenizer, student, teacher
                )
            teacher.to(self.device).requires_grad_(False)
            self.plain_teacher = LanguageModel(teacher, own, self.dtype)
            if method.teacher is not None:
                self.teacher = method.teacher.build(self.plain_teacher, teacher_tokenizer)
        if recipe.optimization.gradient_checkpointing:
            _checkpoint_gradients(student)
        self.student = LanguageModel(student.to(self.device), vocabulary, self.dtype)
        self.stop = stop_ids(self.tokenizer, student)
        self.engine = TransformersEngine(self.student, self.stop)
        self.decoding = Decoding(
            recipe.data.max_response_tokens, recipe.sampling.temperature,
            recipe.sampling.top_p, recipe.sampling.top_k,
        )  # fmt: skip
        if self.plain_teacher and any(t.rollouts.asks_teacher for t in method.terms):
            self.teacher_engine = TransformersEngine(
                self.plain_teacher, stop_ids(self.teacher_tokenizer, self.plain_teacher.module)
            )
            self.cache = ResponseCache(fingerprint(self.plain_teacher.module))

    def _plan(self) -> None:
        """Count the steps and bind what one of them needs."""
        optimization = self.recipe.optimization
        self.max_steps = optimization.max_steps or steps_of_epochs(
            optimization.epochs or 0, len(self.data), optimization.global_batch_size
        )
        if optimization.global_batch_size < self.accelerator.num_processes:
            raise UserError(
                f"global_batch_size {optimization.global_batch_size} is smaller than the number of "
                f"processes {self.accelerator.num_processes}: some would have nothing to do."
            )
        named = [p for p in self.student.module.parameters() if p.requires_grad]
        self.student_learner = _learner(named, self.recipe, optimization.learning_rate)
        adapted = self.teacher.parameters() if self.teacher else []
        self.teacher_learner = (
            _learner(adapted, self.recipe, optimization.teacher_learning_rate) if adapted else None
        )
        if self.method.adaptation and not adapted:
            raise UserError(
                f"The method '{self.method.name}' adapts its teacher, but the teacher "
                f"{self.method.teacher!r} has nothing to train. Use gkd with this teacher instead."
            )
        self.step = Step(
            self.method, self.student, self.teacher, self.student_learner, self.teacher_learner,
            micro_batch_tokens=optimization.micro_batch_tokens,
            max_grad_norm=optimization.max_grad_norm,
            teacher_step=optimization.teacher_step,
            sum_over_ranks=self._sum_over_ranks,
        )  # fmt: skip

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        torch.distributed.all_reduce(tensor)
        return tensor

    # -- the loop

    def run(self) -> None:
        """Train to the end, from the latest good checkpoint if there is one.

        Raises:
            UserError: when training can't go on; what was saved stays loadable.
        """
        if self.finished:
            self.say(f"{self.output} is finished; nothing to do.")
            return
        try:
            self._train()
        except OSError as error:
            if checkpoints.out_of_space(error):
                raise UserError(
                    f"No space left in {self.output}. The last checkpoint is intact: free some "
                    "space and run the same command again."
                ) from None
            raise

    def _train(self) -> None:
        self._resume()
        if self.recipe.tracking:
            self.accelerator.init_trackers("promptkd", self._identity()["recipe"])
        if self.step_number == 0 and self.validation:
            self._evaluate(0)
        progress = tqdm(
            total=self.max_steps, initial=self.step_number, unit="step",
            desc=self.method.name, disable=not self.is_main,
        )  # fmt: skip
        while self.step_number < self.max_steps:
            row = self._take_step(self.step_number)
            self.step_number += 1
            self._log(row)
            progress.update()
            progress.set_postfix(loss=f"{row['loss']:.3f}", length=f"{row['response_length']:.0f}")
            last = self.step_number == self.max_steps
            if self.validation and (last or self._due(self.recipe.evaluation.every_steps)):
                self._evaluate(self.step_number)
            if last or self._due(self.recipe.checkpoints.every_steps):
                self._save_checkpoint()
        progress.close()
        if not self.best:
            self._save_student({})
        self._finish()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step_number % every == 0

    def _take_step(self, step: int) -> dict[str, Any]:
        started = time.perf_counter()
        for learner, base in (
            (self.student_learner, self.recipe.optimization.learning_rate),
            (self.teacher_learner, self.recipe.optimization.teacher_learning_rate),
        ):
            for group in learner.optimizer.param_groups if learner else ():
                group["lr"] = learning_rate(base, step, self.max_steps, self.recipe.optimization)
        batch = batch_of_step(
            self.data, step, self.recipe.optimization.global_batch_size, self.recipe.seed,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        writers = self._writers(step)
        rollouts = [
            term.rollouts.write(batch, writers, state)
            for term, state in zip(self.method.terms, self.source_states, strict=True)
        ]
        written = time.perf_counter()
        metrics = self.step(rollouts, step, self.max_steps)
        loss = metrics.mean("student")
        if self.teacher:
            self.teacher.observe(loss, (step + 1) / self.max_steps)
        row = self._describe(step, rollouts, metrics)
        row["seconds_writing"] = written - started
        row["seconds_learning"] = time.perf_counter() - written
        return row

    def _describe(self, step: int, rollouts: Sequence[Sequence[Rollout]],
                  metrics: StepMetrics) -> dict[str, Any]:  # fmt: skip
        flat = [rollout for written in rollouts for rollout in written]
        counts = [
            len(flat),
            sum(len(r.response_ids) for r in flat),
            sum(r.response_ids[-1] in self.stop for r in flat),
            sum(r.author == "student" and not set(r.response_ids) - set(self.stop) for r in flat),
            sum(r.author == "student" for r in flat),
        ]
        totals = self._sum_over_ranks(
            torch.tensor(counts, dtype=torch.float64, device=self.device)
        ).tolist()
        num_rollouts, num_tokens, num_ended, num_empty, num_by_student = totals
        if num_by_student and num_empty == num_by_student:
            self.say(
                f"warning: step {step + 1}: all {int(num_empty)} responses of the student are "
                "empty (it stops at once). It learns from the stop token alone: warm it up with "
                "the method kd first, or check the template."
            )
        row: dict[str, Any] = {
            "step": step + 1,
            "loss": metrics.mean("student"),
            "response_length": num_tokens / num_rollouts,
            "share_ended": num_ended / num_rollouts,
            "num_empty": int(num_empty),
            "student_share": num_by_student / num_rollouts,
            "num_tokens": int(num_tokens),
            "padding_share": metrics.padding_share,
            "learning_rate": self.student_learner.optimizer.param_groups[0]["lr"],
        }
        for name, key in (
            ("towards_student", "kl_teacher_student"),
            ("towards_itself", "kl_teacher_plain"),
        ):
            if name in metrics.nats:
                row[key] = metrics.mean(name)
        row |= {f"gradient_norm_{who}": norm for who, norm in metrics.gradient_norms.items()}
        return row

    def _writers(self, step: int) -> Writers:
        def rollouts(
            examples: Sequence[EncodedExample], author: str, **options: Any
        ) -> list[Rollout]:
            responses = self.engine.write(
                [e.request_ids for e in examples],
                [(self.recipe.seed, step, e.index) for e in examples],
                self.decoding, **options,
            )  # fmt: skip
            return [
                Rollout(e.index, e.request_ids, r.token_ids, author, r.annotations())
                for e, r in zip(examples, responses, strict=True)
            ]

        def mixed(examples: Sequence[EncodedExample], share: float) -> list[Rollout]:
            assert self.plain_teacher is not None
            return rollouts(examples, "mixed", co_author=CoAuthor(self.plain_teacher, share))

        return Writers(
            lambda examples: rollouts(examples, "student"), self._teacher_writes, mixed,
            step / self.max_steps, self.recipe.seed, step,
        )  # fmt: skip

    def _teacher_writes(self, examples: Sequence[EncodedExample]) -> list[Rollout]:
        """From the cache, or written now; as text, so tokenizers may differ."""
        asked = [self.examples[example.index] for example in examples]
        encoder = Encoder(
            self.teacher_tokenizer, self.recipe.data.template, self.recipe.data.max_request_tokens,
            self.recipe.data.max_response_tokens, self.teacher_tokenizer.eos_token_id,
        )  # fmt: skip
        requests = [encoder.request_ids(example) for example in asked]
        keys = [self.cache.key(r, self.decoding.to_dict(), self.recipe.seed) for r in requests]
        missing = [i for i, key in enumerate(keys) if key not in self.cache]
        if missing:
            responses = self.teacher_engine.write(
                [requests[i] for i in missing],
                [(self.recipe.seed, examples[i].index) for i in missing],
                self.decoding,
            )
            for i, response in zip(missing, responses, strict=True):
                ended = response.token_ids[-1] in self.teacher_engine.stop_ids.tolist()
                text = self.teacher_tokenizer.decode(response.token_ids, skip_special_tokens=True)
                self.cache.put(keys[i], text, ended)
        rollouts = []
        for example, key in zip(examples, keys, strict=True):
            text, ended = self.cache.get(key)
            ids = self.encoder.response_ids(text)
            if not ended and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
                ids = ids[:-1]  # the teacher was cut: nobody said that the text ends here
            rollouts.append(Rollout(example.index, example.request_ids, ids, "teacher"))
        return rollouts

    # -- what is kept

    def _log(self, row: dict[str, Any]) -> None:
        if self.is_main:
            self.metrics.append([row])
        if self.recipe.tracking:
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=row["step"])

    def _evaluate(self, step: int) -> None:
        """Score the student on the validation data; keep it if it is the best so far."""
        assert self.validation is not None
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = Dataset(self.validation.examples[rank::ranks])
        written = predict(self.engine, share, self.decoding, VALIDATION_SEED) if share else []
        sums = {"reverse_kl": 0.0, "num_tokens": 0.0, "cross_entropy": 0.0, "num_reference": 0.0}
        budget = self.recipe.optimization.micro_batch_tokens
        compared = self.plain_teacher and same_tokenizer(self.tokenizer, self.teacher_tokenizer)
        if written and compared:
            own = nats_per_token(written, self.student, self.plain_teacher, budget)
            sums |= {"reverse_kl": own["reverse_kl"], "num_tokens": own["num_tokens"]}
        if written and self.validation.has_references:
            given = nats_per_token(reference_rollouts(share.examples), self.student, None, budget)
            sums["cross_entropy"] = given["cross_entropy"]
            sums["num_reference"] = given["num_tokens"]
        totals = self._sum_over_ranks(
            torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        ).tolist()
        predictions = score(written, share, self.tokenizer, self.stop, VALIDATION_SEED)
        if ranks > 1:
            predictions = gather_object(predictions)
        scores = {name: value["mean"] for name, value in summarise(predictions).items()}
        if compared:
            scores["reverse_kl_to_teacher"] = totals[0] / totals[1]
        if totals[3]:
            scores["validation_loss"] = totals[2] / totals[3]
            for term, state in zip(self.method.terms, self.source_states, strict=True):
                term.rollouts.observe(scores["validation_loss"], state)
        self._log(
            {"step": step, "evaluation": scores, **{f"eval_{k}": v for k, v in scores.items()}}
        )
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.say(f"step {step}: {said}")
        if self.is_main:
            chosen = sorted(predictions, key=lambda p: p.index)[:4]
            self.samples.append({"step": step, **asdict(p)} for p in chosen)
        value = scores[self.recipe.evaluation.metric]
        sign = -1 if self.recipe.evaluation.metric in SMALLER_IS_BETTER else 1
        if step > 0 and (not self.best or sign * value > sign * self.best["value"]):
            self.best = {"step": step, "value": value, "scores": scores}
            self._save_student(scores)

    def _save_checkpoint(self) -> None:
        if self.is_main:
            tensors: dict[str, Any] = {
                "student": self.student.module.state_dict(),
                "student_optimizer": self.student_learner.optimizer.state_dict(),
            }
            if self.teacher:
                tensors["teacher"] = self.teacher.state_dict()
            if self.teacher_learner:
                tensors["teacher_optimizer"] = self.teacher_learner.optimizer.state_dict()
            progress = {"best": self.best, "sources": self.source_states}
            checkpoints.save_checkpoint(
                self.output / "checkpoints",
                Checkpoint(self.step_number, tensors, progress),
                self.recipe.checkpoints.keep,
            )
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        saved, complaints = checkpoints.load_latest(self.output / "checkpoints")
        for complaint in complaints:
            self.say(f"warning: {complaint}")
        if complaints and saved is None:
            self.say("warning: no checkpoint is left; starting from the beginning.")
        if saved:
            self.student.module.load_state_dict(saved.tensors["student"])
            self.student_learner.optimizer.load_state_dict(saved.tensors["student_optimizer"])
            if self.teacher:
                self.teacher.load_state_dict(saved.tensors["teacher"])
            if self.teacher_learner:
                self.teacher_learner.optimizer.load_state_dict(saved.tensors["teacher_optimizer"])
            self.best = saved.progress["best"]
            self.source_states = saved.progress["sources"]
            self.step_number = saved.step
            self.say(f"resuming {self.output} after step {saved.step}")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            checkpoints.recover_replaced(self.output / "student")
            for file in (self.metrics, self.samples):
                file.rewind(self.step_number if saved else -1)

    def _save_student(self, scores: dict[str, float]) -> None:
        if self.is_main:
            from promptkd.model_card import model_card

            with checkpoints.writing(self.output / "student", "student") as directory:
                self.student.module.save_pretrained(directory)
                self.tokenizer.save_pretrained(directory)
                card = model_card(self.recipe, repr(self.method), self.step_number, scores)
                (directory / "README.md").write_text(card)
            if self.teacher and self.recipe.teacher and self.teacher.state_dict():
                with checkpoints.writing(self.output / "teacher_adapter", "adapter") as directory:
                    self.teacher.save(directory, self.recipe.teacher.model)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> None:
        if self.is_main:
            summary = {
                "steps": self.max_steps,
                "best": self.best or None,
                "preflight": self.found,
                "student_parameters": num_parameters(self.student.module),
                "teacher_parameters": (
                    num_parameters(self.plain_teacher.module) if self.plain_teacher else None
                ),
            }
            path = self.output / "summary.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(summary, indent=2))
            partial.rename(path)
        self.accelerator.wait_for_everyone()
        if self.recipe.tracking:
            self.accelerator.end_training()
        self.say(f"finished: {self.output}")


def _learner(parameters: list[nn.Parameter], recipe: Recipe, rate: float) -> Learner:
    """AdamW with decoupled weight decay; biases and norms (one axis) are not decayed.

    The soft prompt has two axes and is decayed, as in the authors' code (paper.md, 5.2).
    """
    decay = recipe.optimization.weight_decay
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimization.optimizer == "sgd":
        return Learner(parameters, torch.optim.SGD(groups, lr=rate))
    return Learner(parameters, torch.optim.AdamW(groups, lr=rate, fused=True))


def _checkpoint_gradients(module: Any) -> None:
    """Recompute activations in backward; transformers does so in training mode only."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    module.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()


def _differences(recorded: dict[str, Any], own: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found = []
    for key in sorted(recorded.keys() | own.keys()):
        first, second = recorded.get(key), own.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            found += _differences(first, second, f"{prefix}{key}.")
        elif first != second:
            found.append(f"{prefix}{key} {first!r} -> {second!r}")
    return [name.removeprefix("recipe.") for name in found]
