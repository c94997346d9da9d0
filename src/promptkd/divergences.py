"""How far apart two next-token distributions are: ``(learner, target) -> nats per token``.

Both arguments are natural-log probabilities over the same vocabulary, one row per response token.
The functions know no masks, tiles or devices, and never detach: who learns is the caller's affair.
With p = target and q = learner:

    forward_kl          KL(p || q)
    reverse_kl          KL(q || p)
    generalized_jsd     beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
    skew_forward_kl     KL(p || skew p + (1 - skew) q)
    skew_reverse_kl     KL(q || (1 - skew) p + skew q)
    total_variation     1/2 sum |p - q|                          (a probability, not nats)
    adaptive_kl         w KL(p || q) + (1 - w) KL(q || p),  w from the head's share of the gap
    alpha_beta          between KL(p || q) (alpha 1, beta 0) and KL(q || p) (alpha 0, beta 1)
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

LogProbs: TypeAlias = Float[Tensor, "tokens vocab"]
PerToken: TypeAlias = Float[Tensor, " tokens"]
DivergenceFunction: TypeAlias = Callable[..., PerToken]


class _KL(torch.autograd.Function):
    """Sum_v first_v (log first_v - log second_v), and its two derivatives in closed form."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:  # pyright: ignore
        probabilities, gap = first.exp(), first - second
        # 0 log 0 counts as 0. log_softmax has no such entries, so a CPU looks first whether there
        # are any; for a look at a GPU's numbers the host would wait, tile by tile. Compiled, it is
        # no pass of its own.
        looks = first.device.type == "cpu" and not torch.compiler.is_compiling()
        if not looks:
            gap.masked_fill_(first == -torch.inf, 0.0)
        value = (probabilities * gap).sum(-1)
        if looks and not torch.isfinite(value).all():
            gap.masked_fill_(first == -torch.inf, 0.0)
            value = (probabilities * gap).sum(-1)
        ctx.save_for_backward(probabilities, gap)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        probabilities, gap = ctx.saved_tensors
        gradient = gradient[..., None]
        to_first = to_second = None
        if ctx.needs_input_grad[0]:
            to_first = torch.addcmul(probabilities, probabilities, gap).mul_(gradient)
        if ctx.needs_input_grad[1]:
            to_second = probabilities * -gradient
        return to_first, to_second


def kl(first: LogProbs, second: LogProbs) -> PerToken:
    """KL(first || second) = sum_v first_v (log first_v - log second_v); 0 log 0 counts as 0."""
    return _KL.apply(first, second)  # pyright: ignore


def forward_kl(learner: LogProbs, target: LogProbs) -> PerToken:
    """KL(target || learner): the learner must cover all that the target might say.

    Source: Hinton et al. 2015.

    >>> forward_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5]]).log())
    tensor([0.])
    """
    return kl(target, learner)


def reverse_kl(learner: LogProbs, target: LogProbs) -> PerToken:
    """KL(learner || target): the learner must say only what the target might say.

    Source: Gu et al. 2023, arXiv:2306.08543; PromptKD, arXiv:2402.12842, Eq. 1, 2 and 4.

    >>> reverse_kl(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log())
    tensor([0.6931])
    """
    return kl(learner, target)


def generalized_jsd(learner: LogProbs, target: LogProbs, beta: float = 0.5) -> PerToken:
    """Beta KL(target || m) + (1 - beta) KL(learner || m), m = beta target + (1 - beta) learner.

    Divided by beta it tends to the forward KL as beta -> 0, divided by 1 - beta to the reverse KL
    as beta -> 1; the divergence itself vanishes at both ends, so they are refused.

    Raises:
        ValueError: if beta is not strictly between 0 and 1.

    Source: GKD, arXiv:2306.13649, Eq. 1.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}: the generalised JSD is zero there. Use 0 < beta < 1, "
            "or forward_kl or reverse_kl for the limits."
        )
    mixture = _mix(target, learner, beta)
    return beta * kl(target, mixture) + (1 - beta) * kl(learner, mixture)


def skew_forward_kl(learner: LogProbs, target: LogProbs, skew: float = 0.1) -> PerToken:
    """KL(target || skew target + (1 - skew) learner); at most log(1 / skew) nats.

    Source: DistiLLM, arXiv:2402.03898, Eq. 3.
    """
    _check_skew(skew)
    return kl(target, _mix(target, learner, skew))


def skew_reverse_kl(learner: LogProbs, target: LogProbs, skew: float = 0.1) -> PerToken:
    """KL(learner || (1 - skew) target + skew learner); at most log(1 / skew) nats.

    Source: DistiLLM, arXiv:2402.03898, section 3.1.
    """
    _check_skew(skew)
    return kl(learner, _mix(learner, target, skew))


def total_variation(learner: LogProbs, target: LogProbs) -> PerToken:
    """Half the absolute difference of the probabilities, between 0 and 1.

    Source: f-distill, arXiv:2307.15190.
    """
    return 0.5 * (learner.exp() - target.exp()).abs().sum(-1)


def adaptive_kl(learner: LogProbs, target: LogProbs, head_mass: float = 0.5) -> PerToken:
    """Forward and reverse KL weighted by where the learner is wrong, in the head or in the tail.

    head = the target's most probable tokens down to cumulative mass ``head_mass``; g = sum |p - q|
    over a part; g_head/(g_head+g_tail) KL(p||q) + g_tail/(g_head+g_tail) KL(q||p). The weights
    carry no gradient, as in DSKD's code; TAID's code lets them, and sums the wrong tokens.

    Source: AKL, arXiv:2404.02657.
    """
    if not 0 <= head_mass <= 1:
        raise ValueError(f"head_mass is {head_mass}: a probability lies in [0, 1].")
    with torch.no_grad():
        p, order = target.exp().sort(-1, descending=True)
        gap = (p - learner.exp().gather(-1, order)).abs()
        head = p.cumsum(-1) - p < head_mass
        head_gap, whole_gap = (gap * head).sum(-1), gap.sum(-1)
        weight = torch.where(whole_gap > 0, head_gap / whole_gap, 0.5)
    return weight * kl(target, learner) + (1 - weight) * kl(learner, target)


def alpha_beta(
    learner: LogProbs, target: LogProbs, alpha: float = 0.2, beta: float = 0.7
) -> PerToken:
    """-1/(alpha beta) sum_v p^alpha q^beta - a p^(alpha+beta) - b q^(alpha+beta), p the target.

    a = alpha/(alpha+beta), b = beta/(alpha+beta). As alpha -> 0 it tends to
    1/beta^2 sum_v q^beta log(q^beta/p^beta) - q^beta + p^beta, which at beta = 1 is KL(q || p); as
    beta -> 0 to the same with p and q exchanged, which at alpha = 1 is KL(p || q); at alpha = beta
    = 1 it is half the squared distance. The defaults are those of the authors' code.

    Raises:
        ValueError: if alpha or beta is negative, or both are 0: a probability of 0 would count
            without bound.

    Source: ABKD, arXiv:2505.04560; Cichocki, Cruces and Amari 2011.
    """
    if alpha < 0 or beta < 0 or alpha == beta == 0:
        raise ValueError(
            f"alpha is {alpha} and beta {beta}: neither may be negative, nor both 0. "
            "Use the authors' 0.2 and 0.7; 1 and 0 are forward_kl, 0 and 1 reverse_kl."
        )
    if alpha == 0:
        return _power_kl(learner, target, beta)
    if beta == 0:
        return _power_kl(target, learner, alpha)
    both = alpha + beta
    product = (alpha * target + beta * learner).exp()
    own = alpha / both * (both * target).exp() + beta / both * (both * learner).exp()
    return (own - product).sum(-1) / (alpha * beta)  # token by token: no term is negative


def _power_kl(first: LogProbs, second: LogProbs, power: float) -> PerToken:
    """1/power^2 sum_v f log(f / s) - f + s, of f = first^power and s = second^power."""
    first, second = power * first, power * second
    return (kl(first, second) - first.exp().sum(-1) + second.exp().sum(-1)) / power**2


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"skew is {skew}: it lies in [0, 1); at 1 the divergence is always zero.")


def _mix(first: LogProbs, second: LogProbs, share: float) -> LogProbs:
    """log(share first + (1 - share) second)."""
    if share == 0:
        return second
    # Where both are impossible, logaddexp(-inf, -inf) would have the gradient NaN.
    first = first.clamp_min(torch.finfo(first.dtype).min)
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


DIVERGENCES: dict[str, DivergenceFunction] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        generalized_jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
        adaptive_kl,
        alpha_beta,
    )
}
