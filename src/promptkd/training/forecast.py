"""How long a run takes and what it leaves on disk, from a few measurements. No torch."""

from dataclasses import dataclass

from promptkd.config import Recipe


@dataclass(frozen=True)
class Measured:
    """What a rehearsal measured, in seconds and bytes, after a first step that warmed up.

    Attributes:
        seconds_start: the first step, which takes longer than later ones.
        seconds_step: the mean of later steps.
        seconds_evaluation: the whole validation data; 0 without any.
        seconds_checkpoint: a checkpoint, written and synchronised.
        bytes_checkpoint: its size.
        bytes_student: the student as it is saved.
        seconds_loading: models, data and checks before the first step; 0 where they are done.
    """

    seconds_start: float
    seconds_step: float
    seconds_evaluation: float
    seconds_checkpoint: float
    bytes_checkpoint: int
    bytes_student: int
    seconds_loading: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How often a run does what."""

    max_steps: int
    evaluation_every: int
    checkpoint_every: int
    checkpoints_kept: int

    @classmethod
    def of(cls, recipe: Recipe, max_steps: int) -> "Schedule":
        """A recipe's, with the number of its steps (it may name epochs)."""
        return cls(
            max_steps=max_steps,
            evaluation_every=recipe.evaluation.every_steps,
            checkpoint_every=recipe.checkpoints.every_steps,
            checkpoints_kept=recipe.checkpoints.keep,
        )

    def num_times(self, every: int) -> int:
        """After every so many steps, and after the last one.

        >>> Schedule(10, 4, 5, 2).num_times(4), Schedule(10, 4, 5, 2).num_times(0)
        (3, 1)
        """
        regular = self.max_steps // every if every else 0
        return regular + (regular * every != self.max_steps)


@dataclass(frozen=True)
class Forecast:
    """The whole run, what its responses' lengths do later aside."""

    seconds: float
    seconds_loading: float
    seconds_steps: float
    seconds_evaluations: float
    seconds_saving: float
    bytes_disk: int


def forecast(measured: Measured, schedule: Schedule) -> Forecast:
    """Loading, steps, evaluations (one before the first step), checkpoints, and saved students.

    A student may be saved after every evaluation but the first; it takes the time of a checkpoint
    of its size.
    """
    num_evaluations = schedule.num_times(schedule.evaluation_every)
    num_checkpoints = schedule.num_times(schedule.checkpoint_every)
    share = measured.bytes_student / measured.bytes_checkpoint
    steps = measured.seconds_start + (schedule.max_steps - 1) * measured.seconds_step
    evaluations = (num_evaluations + 1) * measured.seconds_evaluation
    num_students = num_evaluations if measured.seconds_evaluation else 1
    saving = (num_checkpoints + num_students * share) * measured.seconds_checkpoint
    kept = min(num_checkpoints, schedule.checkpoints_kept + 1)  # one more while it is written
    return Forecast(
        seconds=measured.seconds_loading + steps + evaluations + saving,
        seconds_loading=measured.seconds_loading,
        seconds_steps=steps,
        seconds_evaluations=evaluations,
        seconds_saving=saving,
        bytes_disk=kept * measured.bytes_checkpoint + 2 * measured.bytes_student,
    )
