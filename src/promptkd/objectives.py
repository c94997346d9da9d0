"""What is minimised at each response token, and the pass over the vocabulary that computes it.

An objective maps a ``TokenView`` (log-probabilities of a chunk of response tokens) to nats per
token and knows nothing of chunks, masks, ranks or devices. ``accumulate`` walks the tokens chunk
by chunk, evaluates every loss of the pass on the same log-probabilities, and leaves gradients
behind; nothing of size tokens x vocabulary ever exists.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptkd.divergences import DIVERGENCES, LogProbs, PerToken
from promptkd.models import Head

CHUNK_ENTRIES = 8_000_000
"""Logits per chunk and model (32 MB in fp32); see benchmarks/loss_memory.py."""


@dataclass(frozen=True)
class TokenView:
    """All that an objective sees of some response tokens.

    Attributes:
        student: log-probabilities of the student, which learns.
        teacher: log-probabilities of the target, without gradient; None if nothing needs them.
        tokens: the response's own tokens.
        annotations: numbers written down with the rollout, one per token each.
    """

    student: LogProbs
    teacher: LogProbs | None
    tokens: Int[Tensor, " tokens"]
    annotations: Mapping[str, PerToken] = field(default_factory=dict)

    @property
    def student_at_tokens(self) -> PerToken:
        return self.student.gather(-1, self.tokens[:, None])[:, 0]

    @property
    def target(self) -> LogProbs:
        assert self.teacher is not None, "the trainer runs the teacher when needs_teacher is true"
        return self.teacher

    @property
    def target_at_tokens(self) -> PerToken:
        return self.target.gather(-1, self.tokens[:, None])[:, 0]


@runtime_checkable
class Objective(Protocol):
    """Nats per token, from log-probabilities."""

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def annotations(self) -> tuple[str, ...]: ...

    def __call__(self, view: TokenView) -> PerToken: ...


@dataclass(frozen=True)
class CrossEntropy:
    """-log q(y_t): the response is taken as the truth."""

    needs_teacher = False
    annotations = ()

    def __call__(self, view: TokenView) -> PerToken:
        return -view.student_at_tokens


@dataclass(frozen=True)
class Divergence:
    """A divergence between student and target over the whole vocabulary.

    Attributes:
        name: a key of ``divergences.DIVERGENCES``.
        options: its parameters (beta, skew), as pairs.
    """

    name: str
    options: tuple[tuple[str, float], ...] = ()

    needs_teacher = True
    annotations = ()

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(
                f"divergence '{self.name}' is unknown; known: {', '.join(DIVERGENCES)}"
            )
        uniform = torch.full((1, 2), 0.5).log()
        self.between(uniform, uniform)  # a wrong option fails here, not in the first step

    def between(self, learner: LogProbs, target: LogProbs) -> PerToken:
        return DIVERGENCES[self.name](learner, target, **dict(self.options))

    def __call__(self, view: TokenView) -> PerToken:
        return self.between(view.student, view.target)


@dataclass(frozen=True)
class SampledToken:
    """-(q / q_old) A on the token that was written, A = log p(y_t) - log q_old(y_t).

    Each response serves one update, so q_old is q without its gradient: the value is log q - log p,
    an unbiased estimate of KL(q || p), and the gradient is -A grad log q. Over y_t ~ q both have
    the expectation of the full-vocabulary KL(q || p), because E_q[grad log q] = 0; the variance
    is larger. Only the teacher's log-probability of one token is needed.

    Source: Thinking Machines, on-policy distillation, 2025 (tinker-cookbook, discount 0).
    """

    needs_teacher = True
    annotations = ()

    def __call__(self, view: TokenView) -> PerToken:
        logprobs = view.student_at_tokens
        advantage = view.target_at_tokens - logprobs.detach()
        return -(logprobs - logprobs.detach()).exp() * advantage


@dataclass(frozen=True)
class PolicyGradient:
    """-min(w A, clip(w, 1 - c, 1 + c) A), w = q(y_t) / p~(y_t), A written down with the rollout.

    p~ is what the token was sampled from, so w holds the importance weight of teacher-mixed
    sampling and the drift of the student since, and their product is clipped, as in MiniLLM's code.

    Source: MiniLLM, arXiv:2306.08543, section 2.2; clipping: Schulman et al. 2017, Eq. 7.
    """

    clip: float = 0.2

    needs_teacher = False
    annotations = ("sampling_logprobs", "advantages")

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"clip is {self.clip}: ratios are kept within 1 - clip and 1 + clip.")

    def __call__(self, view: TokenView) -> PerToken:
        advantage = view.annotations["advantages"]
        ratio = (view.student_at_tokens - view.annotations["sampling_logprobs"]).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        return -torch.minimum(ratio * advantage, clipped * advantage)


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of objectives on the same tokens."""

    parts: tuple[tuple[float, Objective], ...]

    @property
    def needs_teacher(self) -> bool:
        return any(objective.needs_teacher for _, objective in self.parts)

    @property
    def annotations(self) -> tuple[str, ...]:
        return tuple(name for _, objective in self.parts for name in objective.annotations)

    def __call__(self, view: TokenView) -> PerToken:
        return torch.stack([weight * objective(view) for weight, objective in self.parts]).sum(0)


@dataclass(frozen=True)
class States:
    """One model's hidden states at the response tokens, and the head that reads them.

    Attributes:
        hidden: part of the trunk's graph if the model learns.
        head: of the model.
        learns: whether gradients go back into this model.
    """

    hidden: Float[Tensor, "tokens width"]
    head: Head
    learns: bool


Losses = Callable[[Mapping[str, LogProbs], slice], Mapping[str, PerToken]]


def accumulate(
    states: Mapping[str, States],
    losses: Losses,
    weights: Mapping[str, float],
    chunk_entries: int = CHUNK_ENTRIES,
) -> dict[str, Tensor]:
    """Evaluate losses chunk by chunk and accumulate their weighted gradients in the models.

    Args:
        states: by name; those that learn receive gradients, trunk and head alike.
        losses: from log-probabilities (by name, those of one chunk) and the chunk's slice to named
            nats per token. Which side of a loss learns is decided there, by detaching the other.
        weights: what one token of each loss weighs, usually 1 / (response tokens of the step).
        chunk_entries: logits per chunk and model.

    Returns:
        Every loss, without gradient, in nats, one entry per response token.
    """
    any_state = next(iter(states.values()))
    num_tokens = any_state.hidden.shape[0]
    chunk = max(1, chunk_entries // any_state.head.vocabulary)
    gradients = {
        name: torch.empty_like(state.hidden) for name, state in states.items() if state.learns
    }
    nats: dict[str, list[Tensor]] = {}
    for start in range(0, num_tokens, chunk):
        piece = slice(start, min(start + chunk, num_tokens))
        logits, logprobs = {}, {}
        for name, state in states.items():
            logits[name] = state.head.logits(state.hidden[piece].detach())
            logits[name].requires_grad_(state.learns)
            logprobs[name] = state.head.logprobs(logits[name])
        values = losses(logprobs, piece)
        if gradients:
            total = torch.stack([weights[name] * value.sum() for name, value in values.items()])
            total.sum().backward()
        for name in gradients:
            state, gradient = states[name], logits[name].grad
            assert gradient is not None, f"no loss reaches '{name}', which should learn"
            gradients[name][piece] = state.head.backward(state.hidden[piece].detach(), gradient)
        for name, value in values.items():
            nats.setdefault(name, []).append(value.detach())
    for name, gradient in gradients.items():
        states[name].hidden.backward(gradient)
    return {name: torch.cat(pieces) for name, pieces in nats.items()}


def options_of(**options: Any) -> tuple[tuple[str, float], ...]:
    """Options that were given (not None), as a hashable tuple."""
    return tuple((name, value) for name, value in options.items() if value is not None)
