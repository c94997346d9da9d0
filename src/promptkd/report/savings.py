"""What the student is lighter and faster by than its teacher, as evaluations measured both."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promptkd.numbers import count
from promptkd.report.data import DataSet, Model, Row, Run

ALIKE = ("engine", "device", "timed_requests", "timed_tokens")
"""What two timings must share to be compared."""
STEADY = 1.5
"""How many times as fast one of two equally large models may be timed for speeds to be compared."""
VLLM = "vllm_tokens_per_second"
"""Where models answered with vLLM; ``tokens_per_second`` is of transformers."""


@dataclass(frozen=True)
class Savings:
    """What was measured of a student, and of its teacher if it was evaluated alike.

    Attributes:
        spread: tokens a second of the slowest and of the fastest of equally large models.
    """

    student: Row
    teacher: Row | None
    spread: tuple[float, float] = (1.0, 1.0)

    def share(self, key: str) -> float | None:
        """The student's value over the teacher's, if both were measured, and steadily."""
        if key.endswith("tokens_per_second") and self.unsteady:
            return None
        own, other = self.student.get(key), (self.teacher or {}).get(key)
        return own / other if own and other else None

    @property
    def unsteady(self) -> str:
        """Why speeds can't be compared; empty where they can."""
        slowest, fastest = self.spread
        if fastest <= STEADY * slowest:
            return ""
        return (
            f"not comparable: {count(slowest)} to {count(fastest)} tokens per second were timed "
            "of equally large models"
        )

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
    return Savings(student, alike[0] if len(alike) == 1 else None, _spread(data))


def _spread(data: DataSet) -> tuple[float, float]:
    """The widest among groups of models of one size that were timed alike."""
    timed: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for model in data.models:
        for evaluation in model.training_seeds or (model.evaluation,):
            if own := evaluation.size_and_speed:
                alike = (own["parameters"], *(own[key] for key in ALIKE))
                timed[alike].append(own["tokens_per_second"])
    spreads = [(min(speeds), max(speeds)) for speeds in timed.values()]
    return max(spreads, key=lambda ends: ends[1] / ends[0])
