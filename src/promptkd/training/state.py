"""What a run must remember to go on where it stopped: the parts of a checkpoint."""

from collections.abc import Iterable
from typing import Any, Protocol

from promptkd.adapters import TrainedWeights
from promptkd.composition import Method
from promptkd.errors import UserError
from promptkd.ranks import Ranks
from promptkd.training.checkpoints import Checkpoint
from promptkd.training.setup import Setup
from promptkd.training.validation import Best


class Checkpointable(Protocol):
    """A part of a run that can be saved and go on."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class SourceStates:
    """What the sources of the method's terms remember on each process; part of checkpoints."""

    def __init__(self, method: Method, ranks: Ranks):
        self._method, self._ranks = method, ranks
        self.own: list[dict[str, Any]] = [{} for _ in method.terms]

    def observe(self, cross_entropy: float) -> None:
        """Tell the sources what the validation found; some are steered by it."""
        for term, state in zip(self._method.terms, self.own, strict=True):
            term.rollouts.observe(cross_entropy, state)

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """Of every process; all of them must ask."""
        return self._ranks.gather([self.own])

    def load_state_dict(self, state: Iterable[list[dict[str, Any]]]) -> None:
        """This process's part.

        Raises:
            UserError: if other processes remembered something, and none of them is here.
        """
        of_ranks = list(state)
        if len(of_ranks) == self._ranks.number:
            self.own = of_ranks[self._ranks.rank]
        elif any(remembered for states in of_ranks for remembered in states):
            raise UserError(
                f"This run was trained by {len(of_ranks)} processes, each of which kept responses "
                f"of its own; now there are {self._ranks.number}. Start {len(of_ranks)} again."
            )


class RunState:
    """The parts of a run by the names they have in its checkpoints.

    Attributes:
        tensors: saved as torch files, one each.
        progress: saved as JSON.
    """

    def __init__(self, setup: Setup, best: Best, sources: SourceStates):
        step, teacher = setup.step, setup.models.teacher
        self.tensors: dict[str, Checkpointable] = {
            "student": TrainedWeights(setup.models.student.module),
            "student_optimizer": step.student_learner,
        }
        if teacher:
            self.tensors["teacher"] = teacher
        if setup.models.average:
            self.tensors["average"] = setup.models.average
        if step.teacher_learner:
            self.tensors["teacher_optimizer"] = step.teacher_learner
        self.progress: dict[str, Checkpointable] = {
            "best": best,
            "sources": sources,
            "step": step,
        }

    def checkpoint(self, step: int) -> Checkpoint:
        """After ``step`` optimizer steps; every process must ask, since sources are gathered."""
        return Checkpoint(
            step=step,
            tensors={name: part.state_dict() for name, part in self.tensors.items()},
            progress={name: part.state_dict() for name, part in self.progress.items()},
        )

    def load(self, saved: Checkpoint) -> None:
        for name, part in self.tensors.items():
            part.load_state_dict(saved.tensors[name])
        for name, part in self.progress.items():
            part.load_state_dict(saved.progress[name])
