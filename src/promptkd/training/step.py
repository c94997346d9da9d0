"""One optimizer step: rollouts in, gradients reduced once, student and teacher moved.

    before_student  (Algorithm 1)  P learns from all of the step's tokens, then the student does,
                                   taught by the P just learnt.
    with_student                   both learn from one prompted pass; the student sees the old P.

The authors' scripts interleave: with gradient accumulation most student gradients see the old
prompt. The only reduction is the global token mean: a sum over all response tokens
of the step, of every rank and micro-batch, divided by their number.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from promptkd.composition import Method, Term
from promptkd.divergences import LogProbs, PerToken
from promptkd.errors import NotFinite
from promptkd.micro_batches import MicroBatch, idle, split_by_length
from promptkd.models import sharding
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.objectives import Losses, Places, States, Tiling, TokenView, accumulate
from promptkd.ranks import ALONE, Ranks
from promptkd.rollouts import Rollout
from promptkd.teachers import Teacher
from promptkd.training.learner import Learner


class Cost:
    """What a step took on this rank, by phase.

    The phases are "student" and "teacher" (their trunks, forward and backward) and "losses" (both
    heads and all that happens between them).

    Attributes:
        seconds: of wall-clock time.
        flops: floating-point operations in products of real tokens with the models' weights;
            attention's own products are not counted.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.device = device

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - started

    def count_trunk(self, phase: str, model: LanguageModel, num_tokens: int, backward: int) -> None:
        """A forward pass, and as many passes' worth of backward (0, 1, or 2 with weights)."""
        self.flops[phase] += 2 * (1 + backward) * model.num_trunk_weights * num_tokens

    def count_heads(self, states: Iterable[States]) -> None:
        for state in states:
            passes = 1 + (1 + state.head.weight.requires_grad if state.learns else 0)
            width, num_tokens = state.hidden.shape[1], state.hidden.shape[0]
            self.flops["losses"] += 2 * passes * state.head.vocabulary * width * num_tokens


class LossNotFinite(NotFinite):
    """A loss or gradient is NaN or infinite; nothing was updated with it."""


@dataclass
class StepMetrics:
    """Sums over the response tokens of a step and all ranks; means are taken when read."""

    cost: Cost
    num_compared: float  # response tokens of the terms that compare with the teacher
    loss: float = 0.0  # what the student minimises: token means of the terms, weighed
    nats: dict[str, float] = field(default_factory=dict)
    gradient_norms: dict[str, float] = field(default_factory=dict)
    padding_share: float = 0.0

    def teacher_mean(self, name: str) -> float:
        """Of one of the adaptation's losses: nats per token that is compared with the teacher."""
        return self.nats[name] / self.num_compared


@dataclass(frozen=True)
class Piece:
    """One micro-batch of one term.

    Attributes:
        num_positions: that the student's products see, padding where rows can't be packed.
        weight: what one of its tokens weighs in the step.
        counts: whether it is reported; see ``_even``.
    """

    term: Term
    batch: MicroBatch
    num_positions: int
    weight: float
    adaptation_weight: float
    counts: bool = True


@dataclass(frozen=True)
class StepSettings:
    """How a step is taken.

    Attributes:
        micro_batch_tokens: of a forward pass.
        kept_tokens: of a step whose graphs of student and teacher both fit; as above if None.
        max_grad_norm: of the student's gradient and of the teacher's, each.
        teacher_step: "before_student" or "with_student", see above.
        tiling: of the losses; the device's own if None.
        compiled: whether what is computed on each tile is compiled.
    """

    micro_batch_tokens: int
    kept_tokens: int | None = None
    max_grad_norm: float = 1.0
    teacher_step: str = "before_student"
    tiling: Tiling | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Work:
    """What one pass over a micro-batch is for.

    Attributes:
        step: counted from 0.
        coefficient: of the regulariser, c_k.
        adapts: whether the teacher receives gradients.
        learns: whether the student does.
    """

    step: int
    coefficient: float
    adapts: bool
    learns: bool


class Step:
    """Everything that one optimizer step needs, bound together once per run."""

    def __init__(
        self,
        method: Method,
        student: LanguageModel,
        teacher: Teacher | None,
        *,
        student_learner: Learner,
        teacher_learner: Learner | None,
        settings: StepSettings,
        ranks: Ranks = ALONE,
    ):
        self.method = method
        self.student = student
        self.teacher = teacher
        self.student_learner = student_learner
        self.teacher_learner = teacher_learner
        self.settings = settings
        self.ranks = ranks
        self._together = sharding.is_sharded(student.module)  # no process passes through it alone

    @property
    def learners(self) -> list[Learner]:
        return [learner for learner in (self.student_learner, self.teacher_learner) if learner]

    def state_dict(self) -> dict[str, Any]:
        """What a run keeps to its end: other cuts would change the last digits."""
        return {n: getattr(self.settings, n) for n in ("micro_batch_tokens", "kept_tokens")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.settings = replace(self.settings, **state)

    def __call__(
        self, rollouts: Sequence[Sequence[Rollout]], step: int, max_steps: int
    ) -> StepMetrics:
        """Learn from one list of rollouts per term of the method.

        Args:
            rollouts: this rank's share.
            step: counted from 0.
            max_steps: K of the annealed regulariser.

        Raises:
            LossNotFinite: before anything is updated with a NaN or infinite value.
        """
        pieces, metrics = self._cut(rollouts)
        adaptation = self.method.adaptation
        coefficient = adaptation.coefficient(step, max_steps) if adaptation else 0.0
        if adaptation and metrics.num_compared:  # all processes sum these, even of nothing
            names = ["towards_student", "towards_itself"] if coefficient else ["towards_student"]
            metrics.nats |= dict.fromkeys(names, 0.0)
        together = self.settings.teacher_step == "with_student"
        kept: dict[int, States] = {}
        if adaptation and not together:
            # Where all fits the budget, the student's graphs are kept and nothing is done twice.
            keeps = self._keeps_graphs(pieces)
            for place, piece in enumerate(pieces):
                student = self._student_states(piece.batch, keeps, metrics.cost)
                if keeps:
                    kept[place] = student
                work = Work(step=step, coefficient=coefficient, adapts=True, learns=False)
                self._evaluate(piece, student, work, metrics)
            self._update("teacher", self.teacher_learner, metrics, ("towards_student",), step)
        for place, piece in enumerate(pieces):
            student = kept.pop(place, None) or self._student_states(piece.batch, True, metrics.cost)
            sharding.expect_gradients(self.student.module, last=place == len(pieces) - 1)
            adapts = adaptation is not None and together
            work = Work(step=step, coefficient=coefficient, adapts=adapts, learns=True)
            self._evaluate(piece, student, work, metrics)
        if adaptation and together:
            self._update("teacher", self.teacher_learner, metrics, ("towards_student",), step)
        self._update("student", self.student_learner, metrics, ("student",), step)
        self._reduce(metrics)
        return metrics

    def _cut(self, rollouts: Sequence[Sequence[Rollout]]) -> tuple[list[Piece], StepMetrics]:
        device = self.student.device
        terms = self.method.terms
        own = [float(sum(len(r.response_ids) for r in written)) for written in rollouts]
        counts = self.ranks.sums(own, device)
        adapting = sum(
            count for term, count in zip(terms, counts, strict=True) if term.objective.needs_teacher
        )
        pieces = []
        for term, written, count in zip(terms, rollouts, counts, strict=True):
            cut = split_by_length(
                written, self.settings.micro_batch_tokens, device, packed=self._packs(written)
            )
            for batch in cut:
                packed = self.student.packs(batch.tokens.shape[1])
                positions = batch.num_tokens if packed else batch.tokens.numel()
                piece = Piece(
                    term,
                    batch,
                    num_positions=positions,
                    weight=term.weight / count,
                    adaptation_weight=1 / adapting if term.objective.needs_teacher else 0.0,
                )
                pieces.append(piece)
        real = sum(piece.batch.num_tokens for piece in pieces)
        seen = sum(piece.num_positions for piece in pieces)
        metrics = StepMetrics(Cost(device), adapting, padding_share=1 - real / seen)
        return self._even(pieces) if self._together else pieces, metrics

    def _even(self, pieces: list[Piece]) -> list[Piece]:
        """As many pieces of each term as any process has, since all pass through them together.

        What is added is one token that weighs nothing.
        """
        own = [[piece for piece in pieces if piece.term is term] for term in self.method.terms]
        most = sharding.most([len(cut) for cut in own], self.student.device)
        for term, cut, number in zip(self.method.terms, own, most, strict=True):
            batch = idle(self.student.device, term.objective.annotations)
            nothing = Piece(term, batch, 2, weight=0.0, adaptation_weight=0.0, counts=False)
            cut += (number - len(cut)) * [nothing]
        return [piece for cut in own for piece in cut]

    def _keeps_graphs(self, pieces: Sequence[Piece]) -> bool:
        """Whether the student's graphs of all pieces are within the budget, on every process."""
        budget = self.settings.kept_tokens or self.settings.micro_batch_tokens
        exceeds = [int(sum(piece.num_positions for piece in pieces) > budget)]
        return not (sharding.most(exceeds, self.student.device) if self._together else exceeds)[0]

    def _packs(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether no model pads rows of these lengths."""
        own = max((rollout.num_tokens for rollout in rollouts), default=0)
        read = max((rollout.for_teacher.num_tokens for rollout in rollouts), default=0)
        teacher = self.teacher
        return self.student.packs(own) and (
            teacher is None or teacher.model.packs(read + teacher.front_length)
        )

    def _student_states(self, batch: MicroBatch, learns: bool, cost: Cost) -> States:
        cost.count_trunk("student", self.student, batch.num_tokens, 2 * learns)
        with torch.set_grad_enabled(learns), cost.timed("student"):
            hidden = self.student.hidden_states(batch.tokens)
            return States(select_responses(hidden, batch.response_mask), self.student.head, learns)

    def _teacher_states(
        self, batch: MicroBatch, learns: bool, cost: Cost, plain: bool = False
    ) -> States:
        assert self.teacher is not None
        batch = batch.for_teacher
        read = self.teacher.plain_hidden_states if plain else self.teacher.hidden_states
        cost.count_trunk("teacher", self.teacher.model, batch.num_tokens, int(learns))
        with torch.set_grad_enabled(learns), cost.timed("teacher"):
            hidden = read(batch.tokens)
            return States(
                select_responses(hidden, batch.response_mask), self.teacher.model.head, learns
            )

    def _evaluate(self, piece: Piece, student: States, work: Work, metrics: StepMetrics) -> None:
        """One pass over the vocabulary: the losses asked for, on the same log-probabilities."""
        objective = piece.term.objective
        adapts = work.adapts and objective.needs_teacher
        if not (adapts or work.learns):
            return
        work = replace(work, adapts=adapts)
        # The head anew: what it multiplies by is held no longer than this pass.
        states = {"student": States(student.hidden, self.student.head, work.learns)}
        if objective.needs_teacher:
            states["teacher"] = self._teacher_states(piece.batch, adapts, metrics.cost)
        if adapts and work.coefficient:
            states["plain"] = self._teacher_states(piece.batch, False, metrics.cost, plain=True)
        weights = {
            "student": piece.weight,
            "towards_student": piece.adaptation_weight,
            "towards_itself": work.coefficient * piece.adaptation_weight,
        }
        metrics.cost.count_heads(states.values())
        losses, timed, own = self._losses(piece, work), metrics.cost.timed, self.settings
        found = accumulate(states, losses, weights, own.tiling, timed, own.compiled)
        for name, nats in found.items():
            total = nats.sum().item()  # all that the host waits for
            if not math.isfinite(total):
                raise LossNotFinite(_not_finite(name, work.step, piece.batch, nats))
            counted = total if piece.counts else 0.0
            metrics.nats[name] = metrics.nats.get(name, 0.0) + counted
            if name == "student":
                metrics.loss += piece.weight * counted

    def _losses(self, piece: Piece, work: Work) -> Losses:
        """What is computed on each tile of log-probabilities: the equations at the top."""
        objective, adaptation, teacher = piece.term.objective, self.method.adaptation, self.teacher
        tokens = piece.batch.response_ids
        annotations = {name: piece.batch.annotation(name) for name in objective.annotations}

        def losses(logprobs: Mapping[str, LogProbs], tile: Places) -> dict[str, PerToken]:
            values = {}
            q = logprobs["student"].detach()
            if work.adapts:
                assert adaptation is not None
                p_prompted = logprobs["teacher"]
                values["towards_student"] = adaptation.towards_student.between(p_prompted, q)
                if "plain" in logprobs:
                    values["towards_itself"] = adaptation.towards_itself.between(
                        p_prompted, logprobs["plain"]
                    )
            if work.learns:
                target = None
                if objective.needs_teacher:
                    assert teacher is not None
                    target = teacher.target(q, logprobs["teacher"].detach())
                view = TokenView(
                    student=logprobs["student"],
                    teacher=target,
                    tokens=tokens[tile],
                    annotations={name: values[tile] for name, values in annotations.items()},
                )
                values["student"] = objective(view)
            return values

        return losses

    def _update(
        self,
        who: str,
        learner: Learner | None,
        metrics: StepMetrics,
        losses: Iterable[str],
        step: int,
    ) -> None:
        """All-reduce, clip, step, zero."""
        assert learner, f"the {who} has nothing to train"
        if who == "student":  # the last to move; the teacher's own weights never do
            teacher = [self.teacher.model] if self.teacher else []
            sharding.release(*(model.module for model in (self.student, *teacher)))
        norm = learner.clip(self.settings.max_grad_norm, self.ranks)
        if not math.isfinite(norm):
            raise LossNotFinite(
                f"The gradient of the {who} is {norm} at step {step + 1}, though the losses "
                f"({', '.join(losses)}) are finite. Nothing was updated with it."
            )
        learner.move()
        metrics.gradient_norms[who] = norm

    def _reduce(self, metrics: StepMetrics) -> None:
        names = sorted(metrics.nats)
        sums = [metrics.loss, *(metrics.nats[name] for name in names)]
        metrics.loss, *totals = self.ranks.sums(sums, self.student.device)
        metrics.nats = dict(zip(names, totals, strict=True))


def _not_finite(name: str, step: int, batch: MicroBatch, nats: Tensor) -> str:
    parts = nats.split([len(rollout.response_ids) for rollout in batch.rollouts])
    rows = zip(batch.rollouts, parts, strict=True)
    guilty = [rollout.index for rollout, own in rows if not torch.isfinite(own).all()]
    return (
        f"The loss '{name}' is not finite at step {step + 1}, on the training examples {guilty} "
        "(rows counted from 0). Nothing was updated with it."
    )
