"""Exposure bias in a study: each method's excess error, over its training seeds. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from promptkd.evaluation.statistics import mean_and_deviation
from promptkd.evaluation.two_levels import Estimate
from promptkd.files import read_json
from promptkd.numbers import plain, signed
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import listed
from promptkd.report.study import EXPOSURE_BIAS
from promptkd.study.file import ExposureSection, Study

FILE = "exposure_bias.json"
LENGTHS = (8, 16, 32, 64, 128, 256, 512)
"""At which the table shows the excess, beside the last."""

BySeed: TypeAlias = Mapping[int, Mapping[str, Any]]
"""Of one method: what ``exposure_bias.json`` of each training seed holds."""


def measured(directory: Path, study: Study) -> dict[str, Any] | None:
    """What stands in a run's exposure_bias.json; None if it isn't what the study asks for."""
    asked = study.evaluation.exposure_bias
    found = read_json(directory / FILE, []) if asked else None
    if asked is None or found is None:
        return None
    wanted = {
        "data": study.evaluation.suite[asked.data],
        "num_examples": asked.num_examples,
        "num_samples": 1,
        "seeds": list(asked.seeds),
    }
    return found if wanted.items() <= found.items() and asked.allows(found["dtype"]) else None


@dataclass(frozen=True)
class Exposures:
    """What was measured of a study's methods, and in which settings.

    Attributes:
        last: the last length that all have, of either version: ``excess_per_token``, in which
            lengths don't matter, and ``excess``, the paper's.
    """

    asked: ExposureSection
    baseline: str
    methods: Mapping[str, BySeed]
    last: Mapping[str, int]

    @classmethod
    def of(cls, study: Study) -> "Exposures | None":
        """Read what is there; None if nothing is."""
        asked, methods = study.evaluation.exposure_bias, _by_method(study)
        if asked is None or not methods:
            return None
        return cls(asked, study.baseline, methods, _last(methods))

    def by_seed(self, label: str, name: str) -> dict[int, float]:
        """A method's excess at the last length, in percent."""
        return {s: _excess(own, name, self.last[name]) for s, own in self.methods[label].items()}

    def to_dict(self) -> dict[str, Any]:
        """Every method's excess at the last length, and the differences to the baseline.

        A mean's interval is Student's over training seeds (one has none); requests and decoding
        seeds are the same for all.
        """
        compared = [label for label in self.methods if label != self.baseline]
        return {
            "lengths": dict(self.last),
            "models": [
                {
                    "label": label,
                    "training_seeds": list(found),
                    "scores": {
                        name: _described(list(self.by_seed(label, name).values()))
                        for name in self.last
                    },
                }
                for label, found in self.methods.items()
            ],
            "differences": [
                {"first": label, "second": self.baseline, "score": name} | difference
                for label in compared
                for name in self.last
                if (difference := self.difference(label, name))
            ],
        }

    def difference(self, label: str, name: str) -> dict[str, Any] | None:
        """To the baseline, paired by training seed; None with fewer than two."""
        if self.baseline not in self.methods:
            return None
        own, other = self.by_seed(label, name), self.by_seed(self.baseline, name)
        paired = [own[seed] - other[seed] for seed in own if seed in other]
        if len(paired) < 2:
            return None
        found = _estimate(paired)
        low, high = found.interval_95
        return {"difference": found.value, "low": low, "high": high, "p_value": found.p_value}

    def table(self) -> Table:
        """The excess at a few lengths, and at the last against the baseline."""
        ends, whole = self.last["excess_per_token"], self.last["excess"]
        lengths = [length for length in LENGTHS if length < ends]
        rows = []
        for label, found in self.methods.items():
            cells = [Cell(label), Cell(str(len(found)))]
            for length in lengths:
                at = [_excess(own, "excess_per_token", length) for own in found.values()]
                cells.append(_cell(at))
            for name in self.last:
                gain = None if label == self.baseline else self.difference(label, name)
                cells += [_cell(list(self.by_seed(label, name).values())), _gain(gain)]
            rows.append((*cells, Cell(_lengths(found))))
        return Table(
            name=EXPOSURE_BIAS,
            title="Exposure bias",
            caption=_caption(self.asked, next(iter(self.methods.values()))),
            headings=(
                *("Model", "Seeds", *(f"{length} tokens, %" for length in lengths)),
                *(f"{ends} tokens, %", f"{ends} tokens, % − {self.baseline}"),
                *(f"paper's, {whole} tokens, %", f"paper's, % − {self.baseline}"),
                "Length: own / teacher's",
            ),
            rows=tuple(rows),
        )


def _caption(asked: ExposureSection, found: BySeed) -> str:
    protocol = next(iter(found.values()))
    return (
        "How much more the student errs after its own text than after the plain teacher's: "
        f"100 (R − E) / E, sums of KL(teacher ‖ student) up to a length, {asked.num_examples} "
        f"requests of {asked.data}, seeds {listed([str(seed) for seed in asked.seeds])}, "
        f"{protocol['dtype']}; first per token, over the responses still running, then as the "
        "paper has it, where a response that has ended counts as no error. 0 is no exposure bias. "
        "Means over training seeds ± their standard deviation; square brackets: Student's 95% "
        "interval over training seeds (requests and decoding seeds are the same for all)."
    )


def _by_method(study: Study) -> dict[str, BySeed]:
    found: dict[str, BySeed] = {}
    for label in study.methods:
        places = {seed: study.place / label / f"seed-{seed}" for seed in study.seeds}
        own = {seed: bias for seed, at in places.items() if (bias := measured(at, study))}
        if own:
            found[label] = own
    return found


def _last(methods: Mapping[str, BySeed]) -> dict[str, int]:
    """The last length that all have, in either version."""
    every = [own for found in methods.values() for own in found.values()]
    return {
        "excess_per_token": min(len(own["per_token"]["steps"]) for own in every),
        "excess": min(len(own["steps"]) for own in every),
    }


def _excess(bias: Mapping[str, Any], name: str, length: int) -> float:
    """In percent; NaN where the error on the teacher's text is none."""
    curve = bias["per_token"] if name == "excess_per_token" else bias
    value = curve["excess"][length - 1]
    return math.nan if value is None else value


def _described(values: Sequence[float]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(values)
    one = len(values) < 2
    return {
        "mean": mean,
        "deviation_over_seeds": None if one else deviation,
        "interval_95": None if one else list(_estimate(values).interval_95),
        "by_seed": list(values),
    }


def _estimate(values: Sequence[float]) -> Estimate:
    """Over training seeds alone."""
    mean, deviation = mean_and_deviation(values)
    return Estimate(
        value=mean,
        standard_error=deviation / math.sqrt(len(values)),
        degrees_of_freedom=len(values) - 1,
        num_seeds=len(values),
        num_requests=0,
    )


def _cell(values: Sequence[float]) -> Cell:
    if any(map(math.isnan, values)):
        return Cell("–")
    described = _described(values)
    spread, interval = described["deviation_over_seeds"], described["interval_95"]
    text = signed(described["mean"]) + ("" if spread is None else f" ± {spread:.1f}")
    return Cell(text, "" if interval is None else _bracketed(*interval))


def _gain(difference: Mapping[str, Any] | None) -> Cell:
    if difference is None:
        return Cell("–")
    low, high = difference["low"], difference["high"]
    return Cell(signed(difference["difference"]), _bracketed(low, high))


def _bracketed(low: float, high: float) -> str:
    return f"[{plain(low)}, {plain(high)}]"


def _lengths(found: BySeed) -> str:
    own, teachers = (
        mean_and_deviation([bias["mean_length"][who] for bias in found.values()])[0]
        for who in ("student", "teacher")
    )
    return f"{own:.1f} / {teachers:.1f}"
