"""What the student is lighter and faster by than its teacher, as evaluations measured both."""

from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.report.data import DataSet, Model, Row, Run

ALIKE = ("engine", "device", "timed_requests", "timed_tokens")
"""What two timings must share to be compared."""


@dataclass(frozen=True)
class Savings:
    """What was measured of a student, and of its teacher if it was evaluated alike."""

    student: Row
    teacher: Row | None

    def share(self, key: str) -> float | None:
        """The student's value over the teacher's."""
        other = (self.teacher or {}).get(key)
        return self.student[key] / other if other else None

    @property
    def how(self) -> str:
        """How speed was measured."""
        own = self.student
        return (
            f"{own['timed_requests']} responses of {own['timed_tokens']} tokens at once, greedy, "
            f"{own['engine']} on {own['device']}"
        )


def savings(run: Run, sets: Sequence[DataSet]) -> Savings | None:
    """From the first data set on which the run was measured; with its teacher's where possible."""
    found = [
        savings_of(own, data)
        for data in sets
        if (own := data.of_run(run)) and own.evaluation.size_and_speed
    ]
    return next((s for s in found if s.teacher), found[0] if found else None)


def savings_of(model: Model, data: DataSet) -> Savings:
    """Of one model, against the teacher on the same data set."""
    student = model.evaluation.size_and_speed
    others = [m.evaluation.size_and_speed for m in data.of_role("teacher")]
    alike = [o for o in others if o and all(o[key] == student[key] for key in ALIKE)]
    return Savings(student, alike[0] if len(alike) == 1 else None)
