"""What a run's metrics say is going wrong: pure functions over its history. No torch.

A history is the lines of metrics.jsonl: steps, and evaluations between them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from promptkd.findings import Finding

Rows = Sequence[dict[str, Any]]

WINDOW = 10
"""Steps that are averaged before they are compared."""
LARGEST_RISE = 10.0
"""Nats per token: about the cross-entropy of a model that knows nothing of its vocabulary."""
UNMOVED = 1e-5
"""Nats: a teacher this near to itself has not been moved by its adaptation."""


def training_warnings(history: Rows) -> list[Finding]:
    """All that is wrong at the end of the history, most recent steps and evaluations alone.

    The order of the checks is that of their codes, and each finds at most one thing.
    """
    # Lines of versions that didn't count responses mix references into lengths and endings.
    steps = [row for row in history if "num_responses" in row]
    scores = [row for row in history if "evaluation" in row]
    return [
        *_all_empty(steps),
        *_endings_fall(steps),
        *_teacher_follows(steps, scores),
        *_student_stands(steps),
        *_teacher_stands(steps),
        *_diverges(steps),
    ]


class Watch:
    """Finds what is new in a growing history: each code is said once in a run."""

    def __init__(self, history: Rows = ()):
        self._history: list[dict[str, Any]] = []
        self._said: set[str] = set()
        for row in history:
            self.add(row)

    def add(self, row: dict[str, Any]) -> list[Finding]:
        """What this row shows for the first time."""
        self._history.append(row)
        found = [f for f in training_warnings(self._history) if f.code not in self._said]
        self._said |= {finding.code for finding in found}
        return found


def _all_empty(steps: Rows) -> Iterator[Finding]:
    if not steps:
        return
    row = steps[-1]
    num_own = _num_own(row)
    if num_own and row["num_empty"] == num_own:
        yield Finding(
            "PK301",
            f"step {row['step']}: all {num_own} responses of the student are empty (it stops at "
            "once). It learns from the stop token alone: warm it up with the method kd first, or "
            "check the template.",
        )


def _num_own(row: Mapping[str, Any]) -> int:
    """How many responses the student wrote in this step."""
    return round(row["student_share"] * row["num_responses"])


def _endings_fall(steps: Rows) -> Iterator[Finding]:
    """Below the best window of the run by a fifth and by three standard errors."""
    own = [row for row in steps if _num_own(row)]
    if len(own) < 2 * WINDOW:
        return
    shares = [row["share_ended"] for row in own]
    windows = [_mean(shares[i : i + WINDOW]) for i in range(len(shares) - WINDOW + 1)]
    best, now = max(windows), windows[-1]
    number = sum(map(_num_own, own[-WINDOW:]))
    error = math.sqrt(2 * best * (1 - best) / number)
    if best - now > max(0.2 * best, 3 * error):
        yield Finding(
            "PK302",
            f"step {own[-1]['step']}: {100 * now:.0f} % of the student's responses end by "
            f"themselves, after {100 * best:.0f} % at their best. Compare with the teacher's, and "
            "lower the learning rates; a soft prompt is held by a larger method.regularizer.",
        )


def _teacher_follows(steps: Rows, scores: Rows) -> Iterator[Finding]:
    """KL(p_P || p) up by half or more between the last two evaluations, KL(q || p) not down."""
    measured = [row for row in scores if "reverse_kl_to_teacher" in row["evaluation"]]
    if len(measured) < 3:
        return
    before, since, now = (row["step"] for row in measured[-3:])
    was, is_ = (row["evaluation"]["reverse_kl_to_teacher"] for row in measured[-2:])
    moved = [(row["step"], row["kl_teacher_plain"]) for row in steps if "kl_teacher_plain" in row]
    earlier = [value for step, value in moved if before < step <= since]
    later = [value for step, value in moved if since < step <= now]
    if not (earlier and later) or is_ < was:
        return
    first, second = _mean(earlier), _mean(later)
    if second > max(1.5 * first, 0.02):
        yield Finding(
            "PK303",
            f"step {now}: the teacher runs after its student. KL(p_P||p) went from {first:.3f} to "
            f"{second:.3f} nats since step {since}, while the student's KL to the teacher as it "
            f"came went from {was:.3f} to {is_:.3f}: a falling loss is no success here. Lower "
            "optimization.teacher_learning_rate, or raise method.regularizer.",
        )


def _student_stands(steps: Rows) -> Iterator[Finding]:
    last = steps[-WINDOW:]
    if len(last) == WINDOW and not any(row["gradient_norm_student"] for row in last):
        yield Finding(
            "PK304",
            f"step {last[-1]['step']}: the student's gradient has been zero for {WINDOW} steps, so "
            "nothing is learnt. Is it equal to its teacher, or are all responses empty?",
        )


def _teacher_stands(steps: Rows) -> Iterator[Finding]:
    moved = [row["kl_teacher_plain"] for row in steps if "kl_teacher_plain" in row]
    if len(moved) >= 2 * WINDOW and max(moved[-WINDOW:]) < UNMOVED:
        yield Finding(
            "PK305",
            f"step {steps[-1]['step']}: the adapted teacher stays where it began (KL(p_P||p) "
            f"{_mean(moved[-WINDOW:]):.1e} nats). Raise optimization.teacher_learning_rate: 10 to "
            "100 times for a soft prompt.",
        )


def _diverges(steps: Rows) -> Iterator[Finding]:
    """A loss ten times the median of those before, and by more nats than a new task costs."""
    if len(steps) < 2:
        return
    *before, last = (row["loss"] for row in steps)
    usual = median(map(abs, before))
    if last > max(10 * usual, usual + LARGEST_RISE):
        yield Finding(
            "PK306",
            f"step {steps[-1]['step']}: the loss is {last:.3g} nats, after a median of "
            f"{usual:.3g}: the run diverges, its steps are too long. Stop it, and go back to a "
            "checkpoint before with lower rates: --restart-from STEP.",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
