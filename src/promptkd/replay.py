"""Sources that remember what was written: inner epochs and the replay buffer.

What they keep lies in their ``state`` as lists and numbers, because checkpoints save it as JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promptkd.data import Batch
from promptkd.rollouts import Generators, Rollout, Source, State, reference_rollouts


@dataclass(frozen=True)
class Repeated:
    """The rollouts of another source serve ``num_steps`` consecutive optimizer steps.

    The inner epochs of policy-gradient methods. The requests of the steps in between are not
    used, so going once through the data takes ``num_steps`` times as many steps.
    """

    source: Source
    num_steps: int

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"inner_epochs is {self.num_steps}: rollouts serve at least one step.")

    @property
    def needs_references(self) -> bool:
        return self.source.needs_references

    @property
    def asks_teacher(self) -> bool:
        return self.source.asks_teacher

    @property
    def needs_validation(self) -> bool:
        return self.source.needs_validation

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        own = state.get("source", {})
        return "rollouts" not in state and self.source.asks_student(batch, generators, own)

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        if "rollouts" not in state:
            written = self.source.generate(batch, generators, state.setdefault("source", {}))
            state |= {"rollouts": [to_json(r) for r in written], "steps_left": self.num_steps}
        rollouts = [from_json(item) for item in state["rollouts"]]
        state["steps_left"] -= 1
        if state["steps_left"] == 0:
            del state["rollouts"]
        return rollouts

    def observe(self, validation_loss: float, state: dict[str, Any]) -> None:
        self.source.observe(validation_loss, state.setdefault("source", {}))


@dataclass(frozen=True)
class AdaptiveReplay:
    """The data's text as long as it helps, then more and more of the student's, partly kept.

    One uniform number r a step, the same on every rank; phi is the student's share:

        r < phi (1 - k/K), or r < phi and the buffer isn't full   the student writes; it is kept
        r < phi otherwise                                         responses kept earlier
        r >= phi                                                  the data

    After an evaluation whose loss is at least ``loss_rise`` above the reference, phi grows by
    ``share_rise`` and that loss is the reference; the first is the loss before training.

    The buffer holds the last ``capacity`` steps that the student wrote. Each place in the batch
    draws among what was written at that place, so the number of ranks doesn't matter; DistiLLM's
    code draws 8 of 1 000 rows per device, which are 125 such steps.

    Source: DistiLLM, arXiv:2402.03898, section 3.2 and its code.
    """

    start_share: float = 0.0
    capacity: int = 125
    loss_rise: float = 0.1
    share_rise: float = 0.1

    needs_references = True
    asks_teacher = False
    needs_validation = True

    def __post_init__(self) -> None:
        if not 0 <= self.start_share <= 1:
            raise ValueError(f"student_share is {self.start_share}: a share lies in [0, 1].")
        if self.capacity < 1:
            raise ValueError(f"capacity is {self.capacity}: the buffer keeps at least one step.")

    def asks_student(self, batch: Batch, generators: Generators, state: State) -> bool:
        phi = state.get("student_share", self.start_share)
        full = len(state.get("kept", [])) == self.capacity
        return generators.chance("replay", phi * (1 - generators.progress) if full else phi)

    def generate(self, batch: Batch, generators: Generators, state: State) -> list[Rollout]:
        phi = state.setdefault("student_share", self.start_share)
        kept = state.setdefault("kept", [])
        if self.asks_student(batch, generators, state):
            written = generators.student(batch.examples)
            kept.append([to_json(rollout) for rollout in written])
            del kept[: -self.capacity]
            return written
        if generators.chance("replay", phi):
            return [
                from_json(kept[generators.pick("kept", len(kept), example.index)][place])
                for place, example in enumerate(batch.examples)
            ]
        return reference_rollouts(batch.examples)

    def observe(self, validation_loss: float, state: dict[str, Any]) -> None:
        reference = state.setdefault("reference", validation_loss)
        if validation_loss >= reference + self.loss_rise:
            phi = state.get("student_share", self.start_share)
            state["student_share"] = min(1.0, phi + self.share_rise)
            state["reference"] = validation_loss


def to_json(rollout: Rollout) -> list[Any]:
    """A rollout as lists and numbers, for a source's state."""
    notes = {name: list(values) for name, values in rollout.annotations.items()}
    ids = [list(rollout.request_ids), list(rollout.response_ids)]
    of_teacher = rollout.teacher_request_ids
    more = [] if of_teacher is None else [list(of_teacher)]
    return [rollout.index, *ids, rollout.author, notes, *more]


def from_json(item: Sequence[Any]) -> Rollout:
    """The rollout that ``to_json`` was given."""
    index, request_ids, response_ids, author, notes, *more = item
    annotations = {name: tuple(values) for name, values in notes.items()}
    ids = tuple(request_ids), tuple(response_ids)
    of_teacher = tuple(more[0]) if more else None
    return Rollout(
        index, *ids, author=author, annotations=annotations, teacher_request_ids=of_teacher
    )
