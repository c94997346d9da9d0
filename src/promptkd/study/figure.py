"""A study's figure: every method's difference to the baseline, with its interval. No torch."""

from pathlib import Path

from promptkd.report.comparisons import score_name
from promptkd.report.figures import Figure, intervals
from promptkd.report.tables import safe_name
from promptkd.study.findings import Findings


def differences_figure(findings: Findings, directory: Path) -> Figure | None:
    """Write differences-NAME.svg and .png; None where there is nothing to compare."""
    score = findings.compared
    found = [gain for own in findings.gains.values() if score and (gain := own.get(score))]
    if not found or score is None:
        return None
    rows = [
        (g.label, g.estimate.value, *g.estimate.interval_95, 0 if g.established else 5)
        for g in found
    ]
    return intervals(
        directory,
        f"differences-{safe_name(findings.title)}",
        f"Differences to {findings.baseline}: {findings.title}",
        "With 95% intervals over requests and training seeds; grey is not established.",
        rows,
        unit=f"{score_name(score)}, minus {findings.baseline}'s",
    )
