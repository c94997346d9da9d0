"""Exposure bias in a study: each method's excess error, over its training seeds. No torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from promptkd.evaluation.statistics import mean_and_deviation
from promptkd.evaluation.two_levels import Estimate
from promptkd.files import read_json
from promptkd.numbers import plain, signed
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import listed
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


def exposure_record(study: Study) -> dict[str, Any] | None:
    """Every method's excess errors at the last length, and the differences to the baseline.

    Both versions: ``excess_per_token``, in which lengths don't matter, and ``excess``, the paper's.
    A mean's interval is Student's over training seeds (one has none); requests and decoding seeds
    are the same for all. None if nothing is measured.
    """
    methods = _by_method(study)
    if not methods:
        return None
    last = _last(methods)
    values = {
        label: {
            name: {s: _excess(own, name, last[name]) for s, own in found.items()} for name in last
        }
        for label, found in methods.items()
    }
    return {
        "lengths": last,
        "models": [
            {
                "label": label,
                "training_seeds": list(methods[label]),
                "scores": {name: _described(list(by.values())) for name, by in own.items()},
            }
            for label, own in values.items()
        ],
        "differences": [
            {"first": label, "second": study.baseline, "score": name} | difference
            for label, own in values.items()
            for name, by in own.items()
            if label != study.baseline and study.baseline in values
            if (difference := _difference(by, values[study.baseline][name]))
        ],
    }


def exposure_table(study: Study) -> Table | None:
    """The excess at a few lengths, and at the last against the baseline."""
    record, asked = exposure_record(study), study.evaluation.exposure_bias
    if record is None or asked is None:
        return None
    methods, last = _by_method(study), record["lengths"]
    lengths = [length for length in LENGTHS if length < last["excess_per_token"]]
    rows = []
    for model in record["models"]:
        label, found = model["label"], methods[model["label"]]
        cells = [Cell(label), Cell(str(len(found)))]
        for length in lengths:
            at = [_excess(own, "excess_per_token", length) for own in found.values()]
            cells.append(_cell(_described(at)))
        for name in last:
            cells += [_cell(model["scores"][name]), _gain(record, label, name)]
        cells.append(Cell(_lengths(found)))
        rows.append(tuple(cells))
    ends, whole = last["excess_per_token"], last["excess"]
    return Table(
        name="exposure-bias",
        title="Exposure bias",
        caption=_caption(asked, next(iter(methods.values()))),
        headings=(
            *("Model", "Seeds", *(f"{length} tokens, %" for length in lengths)),
            *(f"{ends} tokens, %", f"{ends} tokens, % − {study.baseline}"),
            *(f"paper's, {whole} tokens, %", f"paper's, % − {study.baseline}"),
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


def _difference(own: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any] | None:
    """Paired by training seed; None with fewer than two."""
    seeds = [seed for seed in own if seed in other]
    if len(seeds) < 2:
        return None
    found = _estimate([own[seed] - other[seed] for seed in seeds])
    low, high = found.interval_95
    return {"difference": found.value, "low": low, "high": high, "p_value": found.p_value}


def _cell(described: Mapping[str, Any]) -> Cell:
    spread, interval = described["deviation_over_seeds"], described["interval_95"]
    text = signed(described["mean"]) + ("" if spread is None else f" ± {spread:.1f}")
    return Cell(text, "" if interval is None else _bracketed(*interval))


def _gain(record: Mapping[str, Any], label: str, name: str) -> Cell:
    for row in record["differences"]:
        if (row["first"], row["score"]) == (label, name):
            return Cell(signed(row["difference"]), _bracketed(row["low"], row["high"]))
    return Cell("–")


def _bracketed(low: float, high: float) -> str:
    return f"[{plain(low)}, {plain(high)}]"


def _lengths(found: BySeed) -> str:
    own, teachers = (
        mean_and_deviation([bias["mean_length"][who] for bias in found.values()])[0]
        for who in ("student", "teacher")
    )
    return f"{own:.1f} / {teachers:.1f}"
