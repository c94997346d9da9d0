"""How large a study must be: from one method's noise to the differences that a design can show.

A response's score is taken apart, for training seed s, request i and decoding seed r, as

    y_sir = μ + b_i + a_s + c_si + e_sir,

with variances β² between requests, α² between training seeds, γ² of what a seed does to single
requests, and ε² between decoding seeds. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from statistics import fmean

import numpy as np

from promptkd.errors import UserError
from promptkd.evaluation.results import Evaluation
from promptkd.evaluation.two_levels import combined, detectable
from promptkd.numbers import digits
from promptkd.study.findings import Line

TRAINING_SEEDS, DECODING_SEEDS, SHARES = (2, 3, 4, 5, 8, 12), (1, 3, 5), (0.25, 0.5, 1.0, 2.0, 4.0)
"""The designs that are looked at; shares are of the rows that were scored."""


@dataclass(frozen=True)
class Components:
    """Variances of a score on one data set, or averaged over several (see the module).

    Attributes:
        between_training: α²; of the mean over the data sets, where there are several.
        between_requests: β².
        of_both: γ².
        between_decoding: ε².
        rows: per data set, as scored.
    """

    between_training: float
    between_requests: tuple[float, ...]
    of_both: tuple[float, ...]
    between_decoding: tuple[float, ...]
    rows: tuple[int, ...]

    def detectable(
        self,
        num_training: int,
        num_decoding: int,
        share: float = 1.0,
        num_comparisons: int = 1,
    ) -> float:
        """The smallest difference of two methods that the design shows with a power of 80 %.

            (t_ν(α / m) + t_ν(power)) · √(V_requests + V_seeds),
            V_requests = 2 / K² Σ_d (γ_d² + ε_d² / D) / (n_d S),   V_seeds = 2 α² / S + V_requests,

        for S training seeds, D decoding seeds, n_d = share · rows of data set d of K, m
        comparisons, and ν as in ``evaluation.two_levels``, whose interval counts single responses'
        noise on both levels, so this does too. β² cancels: both methods answer the same requests.
        The formula assumes that two methods differ no more from request to request than two
        training seeds of one do, and that their seeds are independent; equal data orders help.
        """
        rows = [max(1, round(share * n)) for n in self.rows]
        noise = [
            (both + decoding / num_decoding) / n
            for both, decoding, n in zip(self.of_both, self.between_decoding, rows, strict=True)
        ]
        of_requests = 2 * sum(noise) / len(rows) ** 2 / num_training
        of_seeds = 2 * self.between_training / num_training + of_requests
        variance, freedom = combined(of_requests, of_seeds, sum(rows), num_training)
        return detectable(sqrt(variance), freedom, num_comparisons)


def components(scores: Sequence[np.ndarray]) -> Components:
    """The variances by the method of moments, each at least 0.

    Args:
        scores: per data set (training seeds, requests, decoding seeds), at least two of each.
    """
    both, decoding, requests, noise = [], [], [], []
    for own in scores:
        num_training, num_rows, num_decoding = own.shape
        cells = own.mean(2)
        residual = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
        of_cells = float((residual**2).sum()) / ((num_training - 1) * (num_rows - 1))
        within = float(own.var(2, ddof=1).mean())
        decoding.append(within)
        both.append(max(0.0, of_cells - within / num_decoding))
        requests.append(max(0.0, float(cells.mean(0).var(ddof=1)) - of_cells / num_training))
        noise.append(of_cells / num_rows)
    means = np.mean([own.mean((1, 2)) for own in scores], axis=0)
    between = float(means.var(ddof=1)) - sum(noise) / len(scores) ** 2
    return Components(
        between_training=max(0.0, between),
        between_requests=tuple(requests),
        of_both=tuple(both),
        between_decoding=tuple(decoding),
        rows=tuple(own.shape[1] for own in scores),
    )


def power_report(
    lines: Iterable[Line], names: Sequence[str], score: str, detect: float, num_comparisons: int
) -> str:
    """The noise of every method that has two training seeds, and which designs tell enough apart.

    Args:
        detect: the difference to be told apart, in the score's own unit.
        num_comparisons: of the study, for Holm's first level.

    Raises:
        UserError: if no method has two training seeds and two decoding seeds scored.
    """
    found = {
        line.label: components(
            [_array([own[name] for own in line.scores], score) for name in names]
        )
        for line in lines
        if line.role == "run" and len(line.seeds) > 1
    }
    if not found:
        raise UserError(
            "No method of this study has scores of two training seeds yet: their noise is unknown. "
            "Run the study with one method and seeds: [0, 1, 2] first."
        )
    said = [f"standard deviations of {score}, over {', '.join(names)}"]
    said += [f"  {label}: {_noise(own)}" for label, own in found.items()]
    whole = _mean(list(found.values()))
    said += [
        f"smallest difference shown with a power of 80%, at level 0.05 / {num_comparisons}",
        f"{'training seeds':>16}{'decoding seeds':>16}"
        + "".join(f"{round(share * sum(whole.rows)):>8} rows" for share in SHARES),
    ]
    for num_training, num_decoding in product(TRAINING_SEEDS, DECODING_SEEDS):
        sizes = [
            whole.detectable(num_training, num_decoding, share, num_comparisons) for share in SHARES
        ]
        cells = [f"{digits(size)}{'*' if size <= detect else ' '}" for size in sizes]
        said.append(f"{num_training:>16}{num_decoding:>16}" + "".join(f"{c:>13}" for c in cells))
    said.append(f"*: tells {digits(detect)} apart. A deviation over 3 training seeds is itself")
    said.append("uncertain by half: leave room.")
    return "\n".join(said)


def _noise(own: Components) -> str:
    parts: Mapping[str, float] = {
        "training seeds": own.between_training,
        "requests": fmean(own.between_requests),
        "a training seed's requests": fmean(own.of_both),
        "decoding seeds": fmean(own.between_decoding),
    }
    return ", ".join(f"between {name} {digits(sqrt(v))}" for name, v in parts.items())


def _mean(found: Sequence[Components]) -> Components:
    """Of several methods: variances are averaged."""

    def over(name: str) -> tuple[float, ...]:
        return tuple(map(fmean, zip(*(getattr(own, name) for own in found), strict=True)))

    return Components(
        between_training=fmean(own.between_training for own in found),
        between_requests=over("between_requests"),
        of_both=over("of_both"),
        between_decoding=over("between_decoding"),
        rows=found[0].rows,
    )


def _array(evaluations: Sequence[Evaluation], score: str) -> np.ndarray:
    """(training seeds, requests, decoding seeds), of one data set."""
    values = [
        {(p.index, p.seed): p.score(score) for p in evaluation.predictions}
        for evaluation in evaluations
    ]
    first = evaluations[0]
    rows = sorted({p.index for p in first.predictions if p.score(score) is not None})
    if len(first.seeds) < 2 or len(rows) < 2:
        raise UserError(
            f"The noise of {score} on {first.name} needs two decoding seeds and two requests that "
            f"have it; there are {len(first.seeds)} and {len(rows)}. Add to evaluation.seeds, or "
            "score more rows."
        )
    return np.array([[[own[i, s] for s in first.seeds] for i in rows] for own in values])
