"""What the student is lighter and faster by than its teacher, as evaluations measured both."""

from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.numbers import count
from promptkd.report.data import DataSet, Model, Row, Run

ALIKE = ("engine", "device", "timed_requests", "timed_tokens")
"""What two timings must share to be compared."""
VLLM = "vllm_tokens_per_second"
"""Where models answered with vLLM; ``tokens_per_second`` is of transformers."""


@dataclass(frozen=True)
class Savings:
    """What was measured of a student, and of its teacher if it was evaluated alike."""

    student: Row
    teacher: Row | None

    def share(self, key: str) -> float | None:
        """The student's value over the teacher's, if both were measured."""
        own, other = self.student.get(key), (self.teacher or {}).get(key)
        return own / other if own and other else None

    @property
    def with_vllm(self) -> str:
        """How much faster than its teacher it is with the other engine, or that nobody knows."""
        faster, own = self.share(VLLM), self.student.get(VLLM)
        if faster and own:
            return f"with vLLM {faster:.2f} times, {count(own)} tokens per second"
        return f"with vLLM {count(own)} tokens per second" if own else "not measured with vLLM"

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
