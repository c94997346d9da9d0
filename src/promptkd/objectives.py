"""What is minimised at each response token, and the pass over the vocabulary that computes it.

An objective maps a ``TokenView`` (log-probabilities of a few response tokens) to nats per
token and knows nothing of tiles, masks, ranks or devices. ``accumulate`` walks the tokens tile by
tile, evaluates every loss of the pass on the same log-probabilities, and leaves gradients behind;
nothing of size tokens x vocabulary ever exists.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptkd.divergences import DIVERGENCES, DivergenceFunction, LogProbs, PerToken
from promptkd.errors import UserError
from promptkd.kernels import compiled as compiler
from promptkd.keys import function_named, suggest
from promptkd.models.language_model import Head


@dataclass(frozen=True)
class Tiling:
    """How much of tokens x vocabulary exists at a time.

    Matrix products are fastest over many tokens, element-wise passes over what fits a cache: so
    logits are made for a chunk of tokens, and turned into their own gradients tile by tile.

    Attributes:
        chunk_entries: logits of one model at a time, in the precision they are multiplied in.
        tile_entries: those of them that the losses see at a time, in fp32; some ten temporaries
            of that size live at once.
    """

    chunk_entries: int
    tile_entries: int


TILINGS = {
    "cpu": Tiling(8_000_000, 250_000),  # benchmarks/loss_memory.py
    "cuda": Tiling(256_000_000, 16_000_000),  # not measured yet
}
"""By device. A chunk of n tokens adds 2 n V h operations to the output layer's gradient and reads
and writes its fp32 sums, 8 V h bytes, whatever n is: at an H100's 989 TFLOP/s and 3.35 TB/s (its
data sheet) products take longer from n = 4 x 989 / 3.35 = 1,181 tokens on. 256 M entries are 1,685
tokens of 152 k; 64 M were 421, where sums would take 2.8 times as long as products."""


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
        name: a key of ``divergences.DIVERGENCES``, or ``module:function``: one's own, with the
            same arguments, from log-probabilities to nats per token.
        options: its parameters (beta, skew), as pairs.
    """

    name: str
    options: tuple[tuple[str, float], ...] = ()

    needs_teacher = True
    annotations = ()

    def __post_init__(self) -> None:
        known = list(inspect.signature(self.function).parameters)[2:]
        for option, _ in self.options:
            if option not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no options"
                raise ValueError(f"divergence '{self.name}' {takes}, but '{option}' is given.")
        # What is wrong fails here, not in the first step.
        _try(self.name, partial(self.function, **dict(self.options)))

    @cached_property
    def function(self) -> DivergenceFunction:
        """Of two log-probabilities; looked up once, and not by a compiler."""
        return divergence_function(self.name)

    def between(self, learner: LogProbs, target: LogProbs) -> PerToken:
        return self.function(learner, target, **dict(self.options))

    def __call__(self, view: TokenView) -> PerToken:
        return self.between(view.student, view.target)


def divergence_function(name: str) -> DivergenceFunction:
    """A divergence by its name in ``DIVERGENCES``, or a user's own by ``module:function``."""
    if ":" in name:
        return function_named(name, "divergence", "of two log-probabilities")
    if name not in DIVERGENCES:
        raise ValueError(f"divergence is '{name}'{suggest(name, list(DIVERGENCES))}")
    return DIVERGENCES[name]


def _try(name: str, between: Callable[[LogProbs, LogProbs], PerToken]) -> None:
    """Refuse a function that is no divergence, on distributions of three tokens over five.

    Raises:
        UserError: if it fails, or its values have another shape, are not 0 between equals, or
            have no finite gradient.
    """
    learner, target = (
        torch.sin(torch.arange(15.0) * rate).view(3, 5).log_softmax(-1) for rate in (1.0, 2.0)
    )
    learner.requires_grad_()
    try:
        apart, alike = between(learner, target), between(target, target)
    except ValueError:
        raise
    except Exception as error:  # a user's function can raise anything
        raise UserError(f"divergence '{name}' fails on (3 tokens, 5 words): {error}") from None
    wrong = None
    if not isinstance(apart, Tensor) or apart.shape != (3,):
        got = list(apart.shape) if isinstance(apart, Tensor) else type(apart).__name__
        wrong = f"gives {got} for 3 tokens. It must give one number per token"
    elif not (apart.isfinite().all() and alike.abs().max() < 1e-4):
        wrong = f"is {alike.tolist()} between equal distributions. It must be finite, and 0 there"
    elif not apart.requires_grad:
        wrong = "has no gradient. It must be computed from the learner's log-probabilities"
    else:
        (gradient,) = torch.autograd.grad(apart.sum(), learner)
        if not gradient.isfinite().all():
            wrong = "has a gradient that is not finite"
    if wrong:
        raise UserError(f"divergence '{name}' {wrong}.")


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


Places = slice | Int[Tensor, " tile"]
"""Which of the response tokens a tile holds; an index of tensors with an entry per token."""
Losses = Callable[[Mapping[str, LogProbs], Places], Mapping[str, PerToken]]
Timed = Callable[[str], AbstractContextManager[Any]]


def untimed(phase: str) -> AbstractContextManager[Any]:
    """A timer that measures nothing."""
    return nullcontext()


def accumulate(
    states: Mapping[str, States],
    losses: Losses,
    weights: Mapping[str, float],
    tiling: Tiling | None = None,
    timed: Timed = untimed,
    compiled: bool = False,
) -> dict[str, Tensor]:
    """Evaluate losses tile by tile and accumulate their weighted gradients in the models.

    Args:
        states: by name; those that learn receive gradients, trunk and head alike.
        losses: from log-probabilities (by name, those of one tile) and the tile's places to named
            nats per token. Which side of a loss learns is decided there, by detaching the other.
        weights: what one token of each loss weighs, usually 1 / (response tokens of the step).
        tiling: ``TILINGS`` of the device by default.
        timed: entered as "losses" around heads and losses, and by name around a trunk's backward.
        compiled: whether all between a tile's logits and its losses is compiled, and the way back.

    Returns:
        Every loss, without gradient, in nats, one entry per response token.
    """
    tiling = tiling or TILINGS[next(iter(states.values())).hidden.device.type]
    with timed("losses"):
        evaluate = partial(_compiled_tile() if compiled else _tile, losses)
        nats, gradients = _walk(states, evaluate, weights, tiling)
    for name, gradient in gradients.items():
        with timed(name):
            states[name].hidden.backward(gradient)
    return nats


def _tile(
    losses: Losses,
    heads: Mapping[str, Head],
    logits: Mapping[str, Float[Tensor, "tile vocab"]],
    places: Places,
) -> Mapping[str, PerToken]:
    """Every loss at every token of a tile."""
    return losses({name: heads[name].normalize(own) for name, own in logits.items()}, places)


@cache
def _compiled_tile() -> Callable[..., Mapping[str, PerToken]]:
    """The same, and its backward pass, fused; places are a tensor, whose length may change."""
    fused = compiler.compiled(_tile)

    def evaluate(
        losses: Losses,
        heads: Mapping[str, Head],
        logits: Mapping[str, Float[Tensor, "tile vocab"]],
        places: slice,
    ) -> Mapping[str, PerToken]:
        device = next(iter(logits.values())).device
        return fused(losses, heads, logits, torch.arange(places.start, places.stop, device=device))

    return evaluate


def _walk(
    states: Mapping[str, States],
    evaluate: Callable[..., Mapping[str, PerToken]],
    weights: Mapping[str, float],
    tiling: Tiling,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every loss at every token, and the gradients to the hidden states of those that learn."""
    any_state = next(iter(states.values()))
    heads = {name: state.head for name, state in states.items()}
    num_tokens, vocabulary = any_state.hidden.shape[0], any_state.head.vocabulary
    learners = {name: state for name, state in states.items() if state.learns}
    gradients = {name: torch.empty_like(state.hidden) for name, state in learners.items()}
    # Whole from the start: small results made between large temporaries would fragment the heap.
    nats: dict[str, Tensor] = {}
    for chunk in _slices(0, num_tokens, tiling.chunk_entries, vocabulary):
        hidden = {name: state.hidden[chunk].detach() for name, state in states.items()}
        logits = {name: state.head.logits(hidden[name]) for name, state in states.items()}
        for tile in _slices(chunk.start, chunk.stop, tiling.tile_entries, vocabulary):
            here = slice(tile.start - chunk.start, tile.stop - chunk.start)
            leaves = {
                name: logits[name][here].detach().requires_grad_(state.learns)
                for name, state in states.items()
            }
            values = evaluate(heads, leaves, tile)
            if learners:
                total = torch.stack([weights[name] * value.sum() for name, value in values.items()])
                total.sum().backward()
            for name in learners:
                gradient = leaves[name].grad
                assert gradient is not None, f"no loss reaches '{name}', which should learn"
                logits[name][here] = gradient  # nobody reads these logits again
            for name, value in values.items():
                if name not in nats:
                    nats[name] = value.new_empty(num_tokens)
                nats[name][tile] = value.detach()
        for name, state in learners.items():
            gradients[name][chunk] = state.head.backward(hidden[name], logits[name])
    return nats, gradients


def _slices(start: int, stop: int, entries: int, vocabulary: int) -> Iterator[slice]:
    """Consecutive tokens, as many at a time as have that many entries together (at least one)."""
    step = max(1, entries // vocabulary)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def options_of(**options: Any) -> tuple[tuple[str, float], ...]:
    """Options that were given (not None), as a hashable tuple."""
    return tuple((name, value) for name, value in options.items() if value is not None)
