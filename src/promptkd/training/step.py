"""One optimizer step: rollouts in, gradients reduced once, student and teacher moved.

    before_student  (Algorithm 1)  P learns from all of the step's tokens, then the student does,
                                   taught by the P just learnt.
    with_student                   both learn from one prompted pass; the student sees the old P.

The authors' scripts interleave: with gradient accumulation most student gradients see the old
prompt. The only reduction is the global token mean: a sum over all response tokens
of the step, of every rank and micro-batch, divided by their number.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from promptkd.composition import Method, Term
from promptkd.errors import UserError
from promptkd.micro_batches import MicroBatch, split_by_length
from promptkd.models.language_model import LanguageModel, select_responses
from promptkd.objectives import States, Tiling, TokenView, accumulate
from promptkd.rollouts import Rollout
from promptkd.teachers import Teacher

SumOverRanks = Callable[[Tensor], Tensor]


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
        self._device = device

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] += time.perf_counter() - started

    def count_trunk(self, phase: str, model: LanguageModel, num_tokens: int, backward: int) -> None:
        """A forward pass, and as many passes' worth of backward (0, 1, or 2 with weights)."""
        self.flops[phase] += 2 * (1 + backward) * model.num_trunk_weights * num_tokens

    def count_heads(self, states: Iterable[States]) -> None:
        for state in states:
            passes = 1 + (1 + state.head.weight.requires_grad if state.learns else 0)
            width, num_tokens = state.hidden.shape[1], state.hidden.shape[0]
            self.flops["losses"] += 2 * passes * state.head.vocabulary * width * num_tokens


class LossNotFinite(UserError):
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
    """

    term: Term
    batch: MicroBatch
    num_positions: int
    weight: float
    adaptation_weight: float


@dataclass(frozen=True)
class Learner:
    """Parameters with their optimizer; gradients are clipped together.

    The gradients stay where they are between steps: to fill new pages costs more than zeros.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)


class Step:
    """Everything that one optimizer step needs, bound together once per run."""

    def __init__(
        self,
        method: Method,
        student: LanguageModel,
        teacher: Teacher | None,
        student_learner: Learner,
        teacher_learner: Learner | None,
        *,
        micro_batch_tokens: int,
        max_grad_norm: float,
        teacher_step: str,
        sum_over_ranks: SumOverRanks = lambda tensor: tensor,
        tiling: Tiling | None = None,
    ):
        self.method = method
        self.student = student
        self.teacher = teacher
        self.student_learner = student_learner
        self.teacher_learner = teacher_learner
        self.micro_batch_tokens = micro_batch_tokens
        self.max_grad_norm = max_grad_norm
        self.teacher_step = teacher_step
        self.sum_over_ranks = sum_over_ranks
        self.tiling = tiling
        embeddings = student.module.get_input_embeddings()
        if student.device.type == "cpu" and isinstance(embeddings, nn.Embedding):
            # The rows of the tokens that were read are added to the gradient; otherwise a second
            # matrix of vocabulary x width is made, and added whole.
            embeddings.sparse = True

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
        together = self.teacher_step == "with_student"
        kept: dict[int, States] = {}
        if adaptation and not together:
            # Where all fits the budget, the student's graphs are kept and nothing is done twice.
            num_positions = sum(piece.num_positions for piece in pieces)
            keeps = len(pieces) == 1 or num_positions <= self.micro_batch_tokens
            for place, piece in enumerate(pieces):
                student = self._student_states(piece.batch, keeps, metrics.cost)
                if keeps:
                    kept[place] = student
                self._evaluate(piece, student, step, coefficient, metrics, adapt=True, learn=False)
            self._update("teacher", self.teacher_learner, metrics, ("towards_student",), step)
        for place, piece in enumerate(pieces):
            student = kept.pop(place, None) or self._student_states(piece.batch, True, metrics.cost)
            adapt = adaptation is not None and together
            self._evaluate(piece, student, step, coefficient, metrics, adapt=adapt, learn=True)
        if adaptation and together:
            self._update("teacher", self.teacher_learner, metrics, ("towards_student",), step)
        self._update("student", self.student_learner, metrics, ("student",), step)
        self._reduce(metrics)
        return metrics

    def _cut(self, rollouts: Sequence[Sequence[Rollout]]) -> tuple[list[Piece], StepMetrics]:
        device = self.student.device
        terms = self.method.terms
        own = [float(sum(len(r.response_ids) for r in written)) for written in rollouts]
        counts = self.sum_over_ranks(torch.tensor(own, device=device, dtype=torch.float64))
        adapting = sum(
            count
            for term, count in zip(terms, counts.tolist(), strict=True)
            if term.objective.needs_teacher
        )
        pieces = []
        for term, written, count in zip(terms, rollouts, counts.tolist(), strict=True):
            cut = split_by_length(
                written, self.micro_batch_tokens, device, packed=self._packs(written)
            )
            for batch in cut:
                packed = self.student.packs(batch.tokens.shape[1])
                positions = batch.num_tokens if packed else batch.tokens.numel()
                adaptation_weight = 1 / adapting if term.objective.needs_teacher else 0.0
                weights = term.weight / count, adaptation_weight
                pieces.append(Piece(term, batch, positions, *weights))
        real = sum(piece.batch.num_tokens for piece in pieces)
        seen = sum(piece.num_positions for piece in pieces)
        return pieces, StepMetrics(Cost(device), adapting, padding_share=1 - real / seen)

    def _packs(self, rollouts: Sequence[Rollout]) -> bool:
        """Whether no model pads rows of these lengths."""
        longest = max((rollout.num_tokens for rollout in rollouts), default=0)
        teacher = self.teacher
        return self.student.packs(longest) and (
            teacher is None or teacher.model.packs(longest + teacher.front_length)
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
        voice = self.teacher.plain_hidden_states if plain else self.teacher.hidden_states
        cost.count_trunk("teacher", self.teacher.model, batch.num_tokens, int(learns))
        with torch.set_grad_enabled(learns), cost.timed("teacher"):
            hidden = voice(batch.tokens)
            return States(
                select_responses(hidden, batch.response_mask), self.teacher.model.head, learns
            )

    def _evaluate(
        self,
        piece: Piece,
        student: States,
        step: int,
        coefficient: float,
        metrics: StepMetrics,
        *,
        adapt: bool,
        learn: bool,
    ) -> None:
        """One pass over the vocabulary: the losses asked for, on the same log-probabilities."""
        objective, adaptation, teacher = piece.term.objective, self.method.adaptation, self.teacher
        adapt = adapt and objective.needs_teacher
        if not (adapt or learn):
            return
        states = {"student": States(student.hidden, student.head, learn)}
        if objective.needs_teacher:
            states["teacher"] = self._teacher_states(piece.batch, adapt, metrics.cost)
        if adapt and coefficient:
            states["plain"] = self._teacher_states(piece.batch, False, metrics.cost, plain=True)
        tokens = piece.batch.response_ids
        annotations = {name: piece.batch.annotation(name) for name in objective.annotations}

        def losses(logprobs, tile: slice):
            values = {}
            heard = logprobs["student"].detach()
            if adapt:
                assert adaptation is not None
                spoken = logprobs["teacher"]
                values["towards_student"] = adaptation.towards_student.between(spoken, heard)
                if coefficient:
                    values["towards_itself"] = adaptation.towards_itself.between(
                        spoken, logprobs["plain"]
                    )
            if learn:
                target = None
                if objective.needs_teacher:
                    assert teacher is not None
                    target = teacher.target(heard, logprobs["teacher"].detach())
                view = TokenView(
                    logprobs["student"],
                    target,
                    tokens[tile],
                    {name: values[tile] for name, values in annotations.items()},
                )
                values["student"] = objective(view)
            return values

        weights = {
            "student": piece.weight,
            "towards_student": piece.adaptation_weight,
            "towards_itself": coefficient * piece.adaptation_weight,
        }
        metrics.cost.count_heads(states.values())
        found = accumulate(states, losses, weights, self.tiling, metrics.cost.timed)
        for name, nats in found.items():
            total = nats.sum().item()
            if not torch.isfinite(nats).all():
                raise LossNotFinite(_not_finite(name, step, piece.batch, nats))
            metrics.nats[name] = metrics.nats.get(name, 0.0) + total
            if name == "student":
                metrics.loss += piece.weight * total

    def _update(
        self,
        who: str,
        learner: Learner | None,
        metrics: StepMetrics,
        losses: Iterable[str],
        step: int,
    ) -> None:
        """Sum the gradients over ranks, clip, move, forget."""
        assert learner is not None, f"the {who} has nothing to train"
        for parameter in learner.parameters:
            assert parameter.grad is not None, "there from the start"
            parameter.grad = self.sum_over_ranks(parameter.grad)
        norm = nn.utils.clip_grad_norm_(learner.parameters, self.max_grad_norm)
        if not torch.isfinite(norm):
            raise LossNotFinite(
                f"The gradient of the {who} is {norm.item()} at step {step + 1}, though the losses "
                f"({', '.join(losses)}) are finite. Nothing was updated; the last checkpoint is "
                "good. Lower the learning rate, or use precision=fp32, and run it again."
            )
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=False)
        metrics.gradient_norms[who] = norm.item()

    def _reduce(self, metrics: StepMetrics) -> None:
        names = sorted(metrics.nats)
        sums = [metrics.loss, *(metrics.nats[name] for name in names)]
        values = torch.tensor(sums, dtype=torch.float64, device=self.student.device)
        metrics.loss, *totals = self.sum_over_ranks(values).tolist()
        metrics.nats = dict(zip(names, totals, strict=True))


def _not_finite(name: str, step: int, batch: MicroBatch, nats: Tensor) -> str:
    guilty, start = [], 0
    for rollout in batch.rollouts:
        end = start + len(rollout.response_ids)
        if not torch.isfinite(nats[start:end]).all():
            guilty.append(rollout.index)
        start = end
    return (
        f"The loss '{name}' is not finite at step {step + 1}, on the training examples {guilty} "
        "(rows counted from 0). Nothing was updated with it; the last checkpoint is good. "
        "Lower the learning rate, or use precision=fp32, and run the same command again."
    )
