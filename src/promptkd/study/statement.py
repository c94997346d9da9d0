"""What a study shows, in sentences: the same in table.md, in study.json and atop the report."""

from promptkd.criteria import SMALLER_IS_BETTER
from promptkd.evaluation.results import Score
from promptkd.numbers import signed
from promptkd.report.comparisons import describe, in_words, listed, number_of, score_name
from promptkd.study.findings import Findings, Gain, Line


def statement(findings: Findings) -> str:
    """Who is ahead on which data, what each scores, and which differences are established.

    >>> statement(Findings.of([], ["dolly"], "gkd"))
    ''
    """
    score, data = findings.compared, findings.data
    means = [
        (line, own[score])
        for line in findings.lines
        if line.role == "run" and (own := findings.scores[line.label]) and score in own
    ]
    if score is None or data is None or not means:
        return ""
    several = len(findings.names) > 1
    where = f"the mean of {listed(list(findings.names))}" if several else describe(data)
    return " ".join([*_ahead(findings, score, means, where), *_against(findings, score)])


def p_value_words(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _ahead(
    findings: Findings, score: str, means: list[tuple[Line, Score]], where: str
) -> list[str]:
    sign = -1 if score in SMALLER_IS_BETTER else 1
    means = sorted(means, key=lambda item: -sign * item[1].mean)
    values = []
    for line, own in means:
        values.append(f"{line.label} {with_spread(own, score)}")
    if len(means) == 1:
        line, own = means[0]
        alone = " (one training seed: what another would change isn't known)"
        known = alone if len(line.seeds) < 2 else ""
        return [f"On {where}, {line.label}'s {in_words(score, own.mean)}{known}."]
    if findings.best:
        head = f"{findings.best} is best of {len(means)} methods on {where}."
    else:
        head = f"No method is established as the best of {len(means)} on {where}."
    number = min(len(line.seeds) for line, _ in means)
    seeds = f"over {number} training seeds" if number > 1 else "with one training seed"
    beside = [
        f"{line.label} {with_spread(own[score], score)}"
        for line in findings.lines
        if line.role != "run" and (own := findings.scores[line.label]) and score in own
    ]
    known = f"; {', '.join(beside)}" if beside else ""
    name, _, unit = score_name(score).partition(", ")
    shown = f"{name} ({unit})" if unit else name
    return [head, f"{shown}, means {seeds}: {', '.join(values)}{known}."]


def with_spread(score: Score, name: str) -> str:
    """``12.3 ± 0.4``: a mean, and the deviation over training seeds where there are several."""
    text = number_of(name)(score.mean)
    spread, decimals = score.deviation_over_seeds, len(text.partition(".")[2])
    return text if spread is None else f"{text} ± {spread:.{decimals}f}"


def _against(findings: Findings, score: str) -> list[str]:
    gains = [
        gain
        for line in findings.lines
        if line.role == "run" and (gain := findings.gains.get(line.label, {}).get(score))
    ]
    if not gains:
        return []
    return [f"Against {findings.baseline}: {'; '.join(map(_in_words, gains))}."]


def _in_words(gain: Gain) -> str:
    number = number_of(gain.score)
    low, high = (signed(end, number) for end in gain.estimate.interval_95)
    value = f"{gain.label} {signed(gain.estimate.value, number)}"
    if gain.established and gain.p_corrected is not None:
        return f"{value} (95% interval {low} to {high}, p {p_value_words(gain.p_corrected)})"
    seen = number(gain.detectable)
    return f"{value} (95% interval {low} to {high}, not established: {seen} or more would be)"
