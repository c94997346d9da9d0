"""What training took: sums over the logged steps of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from promptkd.report.data import Row, Run


@dataclass(frozen=True)
class TrainingCost:
    """What training took, over the logged steps."""

    steps: int
    tokens: int
    seconds_generation: float
    seconds_learning: float
    seconds_teacher: float
    seconds_student: float
    seconds_losses: float
    flops: float
    peak_memory: int

    @property
    def tokens_per_second(self) -> float:
        seconds = self.seconds_generation + self.seconds_learning
        return self.tokens / seconds if seconds else 0.0

    @property
    def seconds_rest(self) -> float:
        """Of learning: the optimizers; all of it in runs whose metrics lack its parts."""
        return self.seconds_learning - (
            self.seconds_teacher + self.seconds_student + self.seconds_losses
        )

    @property
    def flop_rate(self) -> float:
        return self.flops / self.seconds_learning if self.seconds_learning else 0.0


def cost(run: Run) -> TrainingCost | None:
    """Sums over the logged steps; None if there are none."""
    return cost_of_steps(run.steps)


def cost_of_steps(steps: Sequence[Row]) -> TrainingCost | None:
    """The same of the lines of metrics.jsonl that are about steps."""
    if not steps:
        return None
    summed = ("learning", "teacher", "student", "losses")
    seconds = {
        f"seconds_{part}": sum(row.get(f"seconds_{part}", 0.0) for row in steps) for part in summed
    }
    # Runs of earlier versions call it writing; what they took must not be shown as nothing.
    generation = (r.get("seconds_generation", r.get("seconds_writing", 0.0)) for r in steps)
    return TrainingCost(
        seconds_generation=sum(generation),
        steps=len(steps),
        tokens=int(sum(row.get("num_tokens", 0) for row in steps)),
        **seconds,
        flops=sum(row.get("flops", 0.0) for row in steps),
        peak_memory=max(row.get("peak_memory", 0) for row in steps),
    )
