"""What a method is put together from: terms, a teacher and what moves it, all by name."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from promptkd.adapters import LoRA, Prefix
from promptkd.keys import option_faults, refuse_look_alikes, suggest
from promptkd.objectives import CrossEntropy, Divergence, Objective, Weighted
from promptkd.replay import Repeated
from promptkd.rollouts import (
    Corpus,
    Mixture,
    OfflineTeacher,
    Reference,
    Source,
    Student,
    TeacherMixed,
)
from promptkd.teachers import (
    Adaptation,
    Frozen,
    Interpolated,
    SoftPrompt,
    TeacherSpecification,
    TextPrompt,
)


@dataclass(frozen=True)
class Term:
    """Rollouts from one source, and what is minimised at each of their response tokens."""

    rollouts: Source
    objective: Objective
    weight: float = 1.0


@dataclass(frozen=True)
class Method:
    """What the trainer is given; it knows methods by these parts alone, never by name.

    Attributes:
        name: for records.
        terms: their token means are added up, each with its weight.
        teacher: None if no term needs one.
        adaptation: what moves the teacher; None keeps it as built.
        needs_context: whether its teacher must read more than the student.
        options: what its function was given, so that a recipe can name it again.
    """

    name: str
    terms: tuple[Term, ...]
    teacher: TeacherSpecification | None = None
    adaptation: Adaptation | None = None
    needs_context: bool = field(default=False, repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        learns = self.teacher is not None and self.teacher.learns
        if learns and self.adaptation is None:
            raise ValueError(f"nothing here moves the teacher {self.teacher!r}; use promptkd.")
        if self.adaptation is not None and not learns:
            raise ValueError(f"the teacher {self.teacher!r} has nothing to adapt; use gkd with it.")

    @property
    def needs_references(self) -> bool:
        return any(term.rollouts.needs_references for term in self.terms)

    @property
    def needs_validation(self) -> bool:
        return any(term.rollouts.needs_validation for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        return self.teacher is not None

    @property
    def compares_tokens(self) -> bool:
        """Whether student and teacher are compared token by token, so need one token table."""
        return any(term.objective.needs_teacher for term in self.terms)

    @property
    def student_writes_alone(self) -> bool:
        """Whether it learns from what the student writes without its teacher's help."""
        others = Reference | OfflineTeacher | Corpus | TeacherMixed
        return any(not isinstance(_first_source(term.rollouts), others) for term in self.terms)

    def is_recorded(self, record: str) -> bool:
        """Whether ``record`` is the repr of this composition, an earlier version's perhaps.

        What a part was given before it had an option does what that option's default does.
        """
        return re.fullmatch(_spelling(self), record) is not None


def _first_source(source: Source) -> Source:
    """Who writes what is repeated."""
    return _first_source(source.source) if isinstance(source, Repeated) else source


def _spelling(part: Any) -> str:
    """A regular expression of its repr, in which options at their defaults may be missing."""
    if isinstance(part, tuple):
        return rf"\({'(?:, )?'.join(map(_spelling, part))},?\)"
    if not is_dataclass(part):
        return re.escape(repr(part))
    options = ""
    for own in fields(part):
        value = getattr(part, own.name)
        default = own.default if own.default_factory is MISSING else own.default_factory()
        spelled = rf"(?:{own.name}={_spelling(value)}(?:, )?)"
        if own.repr:
            options += f"{spelled}?" if value == default else spelled
    return rf"{re.escape(type(part).__qualname__)}\({options}\)"


TEACHERS: dict[str, type[TeacherSpecification]] = {
    "frozen": Frozen,
    "text_prompt": TextPrompt,
    "soft_prompt": SoftPrompt,
    "lora": LoRA,
    "prefix": Prefix,
    "interpolated": Interpolated,
}


def teacher_specification(
    name: str, options: Mapping[str, Any] | None = None
) -> TeacherSpecification:
    """A teacher by name, with the options of its class.

    Raises:
        ValueError: for an unknown name or option, with the nearest known one.
    """
    if name not in TEACHERS:
        raise ValueError(f"teacher is '{name}'{suggest(name, list(TEACHERS))}")
    specification: Any = TEACHERS[name]
    known = {field.name: field.type for field in fields(specification)}
    for option, value in (options or {}).items():
        if option not in known:
            nearest = suggest(option, list(known)) if known else f"; '{name}' has no options"
            raise ValueError(f"unknown key 'teacher_options.{option}'{nearest}")
        try:
            refuse_look_alikes(value, known[option])
        except ValueError as error:
            raise ValueError(f"'teacher_options.{option}' is {value!r}: {error}.") from None
    try:
        return TypeAdapter(specification).validate_python(dict(options or {}))
    except ValidationError as error:
        raise ValueError(option_faults(error, "teacher_options.")) from None


def source(name: str, student_share: float | None = None) -> Source:
    """Who writes, by name: reference, student, teacher, or mixture (with its student_share)."""
    if name == "mixture":
        return Mixture(0.5 if student_share is None else student_share)
    sources = {"reference": Reference(), "student": Student(), "teacher": OfflineTeacher()}
    if name not in sources:
        raise ValueError(f"rollouts is '{name}'{suggest(name, [*sources, 'mixture'])}")
    return sources[name]


def with_sft(term: Term, share: float) -> tuple[Term, ...]:
    """A term, and in its place to ``share`` the cross-entropy on the same requests' references.

    Raises:
        ValueError: for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"sft_share is {share}: a share lies in [0, 1); with 1 take sft.")
    if share == 0:
        return (term,)
    return replace(term, weight=1 - share), Term(Reference(), CrossEntropy(), share)


def cross_entropy_and_kl(kl_share: float) -> Objective:
    """(1 - kl_share) (-log q) + kl_share KL(p || q) at each token.

    Raises:
        ValueError: for a share outside [0, 1].
    """
    if not 0 <= kl_share <= 1:
        raise ValueError(f"kl_share is {kl_share}: a share lies in [0, 1].")
    if kl_share == 0:
        return CrossEntropy()
    if kl_share == 1:
        return Divergence("forward_kl")
    return Weighted(((1 - kl_share, CrossEntropy()), (kl_share, Divergence("forward_kl"))))
