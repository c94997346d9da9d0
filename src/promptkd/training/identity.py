"""What makes a run this run: its record, and what may differ when it goes on."""

from dataclasses import dataclass
from typing import Any, get_args

from pydantic_core import to_jsonable_python

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import UserError
from promptkd.keys import Section

GROWING = ("optimization.max_steps", "optimization.epochs")
"""May become larger without being asked."""
RATES = (
    "optimization.learning_rate",
    "optimization.teacher_learning_rate",
    "optimization.warmup_steps",
    "optimization.schedule",
    "optimization.max_grad_norm",
    "precision",
)
"""May differ after ``--restart-from``: what a run that diverged needs."""
FIXED = (
    "method",
    "student",
    "teacher",
    "optimization.optimizer",
    "optimization.weight_decay",
    "optimization.micro_batch_tokens",
    "evaluation.metric",
)
"""Never differ: checkpoints hold them, or states that belong to them."""
COMPOSITION = "method.composition"
ELSEWHERE = ("output", "tracking", "sharding", "gathered_for")
"""No part of an identity: where a run goes, who watches, who has parts and for how long."""
LONGEST_VALUE = 80

Contents = dict[str, str | dict[str, Any]]
"""What a run learns from, by name: digests, or settings that can be told apart one by one."""


@dataclass(frozen=True)
class Resuming:
    """What the user allows a run that goes on.

    Attributes:
        restart_from: the step whose checkpoint it goes back to, with other rates if wanted; 0 is
            the start, None the latest checkpoint.
        allow_changes: whether data, weights and most of the recipe may differ.
    """

    restart_from: int | None = None
    allow_changes: bool = False

    def allows(self, change: "Change") -> bool:
        if any(change.key == key or change.key.startswith(f"{key}.") for key in FIXED):
            return False
        rates = RATES if self.restart_from is not None else ()
        return change.grows or change.key in rates or self.allow_changes


AS_IT_WAS = Resuming()
"""Nothing differs, and the latest checkpoint is where it goes on."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from the one a run began with."""

    key: str
    before: Any
    after: Any

    @property
    def grows(self) -> bool:
        numbers = isinstance(self.before, int | float) and isinstance(self.after, int | float)
        return self.key in GROWING and numbers and self.after > self.before

    def __str__(self) -> str:
        if self.key == COMPOSITION:
            return "method, composed otherwise under the same name"
        return f"{self.key} {_short(self.before)} -> {_short(self.after)}"


def identity(recipe: Recipe, method: Method) -> dict[str, Any]:
    """What must be equal for a run to go on: all but ``ELSEWHERE``."""
    settings = {key: value for key, value in recipe.to_dict().items() if key not in ELSEWHERE}
    return {"recipe": settings, "method": repr(method)}


def changes(recorded: dict[str, Any], recipe: Recipe, method: Method) -> list[Change]:
    """How a recorded identity differs from that of ``recipe`` and ``method``, setting by setting.

    The record may be an earlier version's: what it doesn't name is at today's default.
    """
    own, there = identity(recipe, method), recorded["recipe"]
    sampling = {**there.get("sampling", {}), "engine": recorded_engine(there)}
    before = _with_defaults(Recipe, {**there, "sampling": sampling})
    before = {key: value for key, value in before.items() if key not in ELSEWHERE}
    found = differences(before, own["recipe"])
    named = any(change.key.startswith("method") for change in found)
    if not named and not method.is_recorded(recorded["method"]):
        found.append(Change(COMPOSITION, recorded["method"], own["method"]))
    return found


def recorded_engine(recipe: dict[str, Any]) -> str:
    """Who writes in the run of a recorded recipe; where that names nobody, there was no choice."""
    return recipe.get("sampling", {}).get("engine", "transformers")


def check(found: list[Change], resuming: Resuming, place: str) -> None:
    """Refuse what the user hasn't allowed, with the way to allow it.

    Raises:
        UserError: naming every such setting.
    """
    refused = [change for change in found if not resuming.allows(change)]
    if not refused:
        return
    allowing = (
        (
            Resuming(restart_from=0),
            "--restart-from STEP goes back to a checkpoint with it",
        ),
        (Resuming(allow_changes=True), "--allow-changes goes on with it"),
    )
    ways = [said for way, said in allowing if all(map(way.allows, refused))]
    also = "".join(f"; {said}" for said in ways)
    raise UserError(
        f"{place} belongs to a run of a different recipe ({', '.join(map(str, refused))}). Choose "
        f"another output, or remove that directory{also}."
    )


def differences(recorded: dict[str, Any], own: dict[str, Any], prefix: str = "") -> list[Change]:
    """Dotted keys whose values differ."""
    found: list[Change] = []
    for key in sorted(recorded.keys() | own.keys()):
        first, second = recorded.get(key), own.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            found += differences(first, second, f"{prefix}{key}.")
        elif first != second:
            found.append(Change(f"{prefix}{key}", first, second))
    return found


def other_contents(recorded: Contents, own: Contents) -> list[str]:
    """What isn't as it is on record, setting by setting where that is known.

    An earlier version's record lacks what nobody compared then.
    """
    found: list[str] = []
    for name in sorted(recorded.keys() & own.keys()):
        before, now = recorded[name], own[name]
        if isinstance(before, dict) and isinstance(now, dict):
            known = before.keys() & now.keys()  # another version of transformers may have more
            first, second = ({key: own[key] for key in known} for own in (before, now))
            settings = ", ".join(map(str, differences(first, second)))
            found += [f"{name} ({settings})"] * bool(settings)
        elif before != now:
            found.append(name)
    return found


def _with_defaults(section: type[Section], recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe with the keys that came after it, at what they do where nobody gives them.

    Whatever was no default stands in the record, so a key that doesn't is at its default or was
    unknown then. Keys that are unknown now stay as they are.
    """
    filled = dict(recorded)
    for key, field in section.model_fields.items():
        own = recorded.get(key)
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if inner and isinstance(own, dict):
            filled[key] = _with_defaults(inner[0], own)
        elif key not in recorded and not field.is_required() and field.default is not None:
            filled[key] = to_jsonable_python(field.default, exclude_none=True)
    return filled


def _short(value: Any) -> str:
    text, half = repr(value), LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]} ... {text[-half:]}"
