"""A study's tables: one per data set and one for their mean. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from promptkd.evaluation.results import Score
from promptkd.numbers import count, digits, duration, like, signed
from promptkd.report.cells import Cell, Table
from promptkd.report.comparisons import (
    decoding_words,
    describe,
    in_order,
    number_of,
    score_name,
)
from promptkd.report.data import DataSet
from promptkd.report.tables import safe_name
from promptkd.study.findings import Findings, Gain, Line
from promptkd.study.statement import p_value_words, with_spread

HIDDEN = ("exact_match", "cross_entropy")
"""Left out of the table unless they decide; study.json has them."""


@dataclass(frozen=True)
class Failure:
    """A run that ended in an error, and its sentence."""

    label: str
    seed: int
    reason: str


def study_table(findings: Findings, num_seeds: int, failed: Sequence[Failure]) -> Table:
    """Methods, start and teacher, each against the baseline."""
    compared = findings.compared
    known = in_order({name for own in findings.scores.values() if own for name in own})
    shown = [name for name in known if name not in HIDDEN and name != compared]
    shown = [*([compared] if compared else []), *shown]
    with_gain = [n for n in shown if n in (compared, "reverse_kl_to_teacher")]
    headings = ["Model", "Seeds"]
    for name in shown:
        headings.append(score_name(name))
        if name in with_gain:
            headings.append(f"{score_name(name)} − {findings.baseline}")
    rows = []
    for line in findings.lines:
        cells = [Cell(line.label), Cell(_seeds(line, num_seeds))]
        scores = findings.scores[line.label] or {}
        for name in shown:
            best = name == compared and findings.best == line.label
            cells.append(_value(name, scores[name], best) if name in scores else Cell("–"))
            if name in with_gain:
                cells.append(_gain(findings, line, name))
        rows.append((*cells, _cost(line)))
    return Table(
        name=f"scores-{safe_name(findings.title)}",
        title=findings.title,
        caption=_caption(findings, with_gain, failed),
        headings=(*headings, "Training"),
        rows=tuple(rows),
    )


def methods_table(findings: Findings) -> Table | None:
    """A study at a glance: by the score that decides, the methods and what each gained."""
    score, data = findings.compared, findings.data
    if score is None or data is None:
        return None
    number = number_of(score)
    rows = []
    for line in findings.lines:
        own = (findings.scores[line.label] or {}).get(score)
        if own is None:
            continue
        seeds = own.by_seed if line.role == "run" else ()
        rows.append(
            (
                Cell(line.label),
                _value(score, own, findings.best == line.label),
                Cell(", ".join(map(number, seeds)) or "–"),
                _gain(findings, line, score),
            )
        )
    return Table(
        name="methods",
        title="The methods",
        caption=f"{_where(findings, data)}. Means over training seeds ± their standard deviation; "
        "square brackets: 95% interval over requests and training seeds (with one seed: over "
        "requests alone).",
        headings=(
            "Model",
            score_name(score),
            "Each training seed",
            f"Difference to {findings.baseline}",
        ),
        rows=tuple(rows),
    )


def _where(findings: Findings, data: DataSet) -> str:
    several = len(findings.names) > 1
    return f"The mean of {', '.join(findings.names)}" if several else describe(data)


def _caption(findings: Findings, with_gain: Sequence[str], failed: Sequence[Failure]) -> str:
    said = []
    if findings.data:
        said = [
            f"{_where(findings, findings.data)}; {decoding_words(findings.data.evaluation)}. "
            "±: standard deviation over training seeds. Square brackets: 95% interval over "
            "requests and training seeds (with one seed: over requests alone)."
        ]
    if any(findings.gains.values()):
        said.append(
            "Differences are paired by request and training seed. Established: p below 0.05 "
            "after Holm's correction over the methods compared with the baseline in this score."
        )
        said += [_detectable(findings, name) for name in with_gain]
    if findings.best:
        said.append("Bold: better than every other method, corrected likewise.")
    said += [
        f"Failed: {failure.label}, seed {failure.seed}: {failure.reason}" for failure in failed
    ]
    return " ".join(sentence for sentence in said if sentence)


def _detectable(findings: Findings, score: str) -> str:
    """The smallest difference that the design could have shown, as a range over the methods."""
    found = [
        gain
        for own in findings.gains.values()
        if (gain := own.get(score)) and gain.p_corrected is not None
    ]
    if not found:
        return ""
    least, most = (digits(pick(gain.detectable for gain in found)) for pick in (min, max))
    size = least if least == most else f"{least} to {most}"
    number = found[0].num_comparisons
    level = f"0.05 / {number}" if number > 1 else "0.05"
    return (
        f"The smallest true difference that this design shows with a power of 80%, at level "
        f"{level}: {size} {score_name(score)}."
    )


def _seeds(line: Line, num_planned: int) -> str:
    if line.role != "run":
        return "–"
    done = len(line.seeds)
    return str(done) if done == num_planned else f"{done} of {num_planned}"


def _gain(findings: Findings, line: Line, score: str) -> Cell:
    if line.label == findings.baseline or findings.scores[line.label] is None:
        return Cell("–")
    gain = findings.gains.get(line.label, {}).get(score)
    if gain is None:
        return Cell("not comparable")
    low, high = gain.estimate.interval_95
    number = number_of(score)
    return Cell(
        signed(gain.estimate.value, number), f"[{number(low)}, {number(high)}]{_verdict(gain)}"
    )


def _verdict(gain: Gain) -> str:
    if gain.p_corrected is None:
        return ""
    return f" p {p_value_words(gain.p_corrected)}" if gain.established else " not established"


def _value(name: str, score: Score, best: bool) -> Cell:
    text, interval = with_spread(score, name), score.interval_95
    mean = text.partition(" ")[0]
    detail = f"[{like(mean, interval[0])}, {like(mean, interval[1])}]" if interval else ""
    return Cell(text, detail, best)


def _cost(line: Line) -> Cell:
    """The mean over training seeds of the steps' time and of the response tokens learnt from."""
    if not line.costs:
        return Cell("–")
    seconds = fmean(own.seconds_generation + own.seconds_learning for own in line.costs)
    tokens = fmean(own.tokens for own in line.costs)
    return Cell(duration(seconds), f"{count(tokens)} tokens")
