"""Every method, as a composition: who writes x what is minimised x what happens to the teacher.

Read this file as a table. Each function returns a ``Method``; its parameters are the options a
recipe may set. Equation and section numbers are those of the papers named in the docstrings.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from promptkd.config import suggest
from promptkd.errors import UserError
from promptkd.objectives import (
    CrossEntropy,
    Divergence,
    Objective,
    Weighted,
    options_of,
)
from promptkd.rollouts import Mixture, Reference, Source, Student, Teacher
from promptkd.teachers import (
    TEACHERS,
    Adaptation,
    Frozen,
    SoftPrompt,
    TeacherSpecification,
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
    """

    name: str
    terms: tuple[Term, ...]
    teacher: TeacherSpecification | None = None
    adaptation: Adaptation | None = None

    @property
    def needs_references(self) -> bool:
        return any(term.rollouts.needs_references for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        return self.teacher is not None

    @property
    def compares_tokens(self) -> bool:
        """Whether student and teacher are compared token by token, so need one token table."""
        return any(term.objective.needs_teacher for term in self.terms)


def sft() -> Method:
    """Supervised fine-tuning: -log q on the reference responses."""
    return Method("sft", (Term(Reference(), CrossEntropy()),))


def kd(kl_share: float = 0.5, rollouts: str = "reference") -> Method:
    """Word-level distillation: (1 - kl_share) cross-entropy + kl_share KL(p || q).

    Source: Hinton et al. 2015; kl_share 0.5 as in MiniLLM's and PromptKD's scripts.
    """
    return Method(
        "kd", (Term(source(rollouts), _cross_entropy_and_kl(kl_share)),), teacher=Frozen()
    )


def seqkd(kl_share: float = 0.0) -> Method:
    """Sequence-level distillation: -log q on responses the teacher wrote once, off-line.

    Sampled at the run's decoding settings rather than by beam search. kl_share 0.5 gives the
    mixture with KL(p || q) of MiniLLM's and PromptKD's scripts.

    Source: Kim and Rush 2016, arXiv:1606.07947.
    """
    return Method("seqkd", (Term(Teacher(), _cross_entropy_and_kl(kl_share)),), teacher=Frozen())


def gkd(student_share: float = 1.0, divergence: str = "reverse_kl", beta: float | None = None,
        skew: float | None = None, teacher: str = "frozen") -> Method:  # fmt: skip
    """Generalised distillation: any divergence, on the student's text with prob. student_share.

    The defaults are the row called GKD in PromptKD's tables: student_share 1, reverse KL. The GKD
    paper's own choices include student_share 0.5 with divergence generalized_jsd, beta 0.5.

    Source: Agarwal et al. 2023, arXiv:2306.13649.
    """
    writer = Student() if student_share == 1 else Mixture(student_share)
    objective = Divergence(divergence, options_of(beta=beta, skew=skew))
    return Method("gkd", (Term(writer, objective),), teacher=teacher_specification(teacher))


def promptkd(length: int = 7, init: str = "text", init_text: str = "Suppose you are a student.",
             regularizer: float = 1.0, rollouts: str = "student",
             student_share: float | None = None, divergence: str = "reverse_kl",
             beta: float | None = None, skew: float | None = None,
             adaptation_divergence: str = "reverse_kl",
             regularizer_divergence: str = "reverse_kl", teacher: str = "soft_prompt",
             ) -> Method:  # fmt: skip
    """The teacher's soft prompt learns to be understood; the student learns from that teacher.

        L_prompt  = KL(p_P || q) + regularizer (K - k)/K KL(p_P || p)     moves P
        L_student = KL(q || p_P)                                          moves q

    Source: Kim, Jang and Yang 2024, arXiv:2402.12842, Eq. 1-4; ablations: appendix D.
    """
    specification = (
        SoftPrompt(length, init, init_text)  # pyright: ignore[reportArgumentType]
        if teacher == "soft_prompt"
        else teacher_specification(teacher)
    )
    return Method(
        "promptkd",
        (
            Term(
                source(rollouts, student_share),
                Divergence(divergence, options_of(beta=beta, skew=skew)),
            ),
        ),
        teacher=specification,
        adaptation=Adaptation(
            Divergence(adaptation_divergence), Divergence(regularizer_divergence), regularizer
        ),
    )


def source(name: str, student_share: float | None = None) -> Source:
    """Who writes, by name: reference, student, teacher, or mixture (with its student_share)."""
    if name == "mixture":
        return Mixture(0.5 if student_share is None else student_share)
    sources = {"reference": Reference(), "student": Student(), "teacher": Teacher()}
    if name not in sources:
        raise ValueError(f"rollouts is '{name}'{suggest(name, [*sources, 'mixture'])}")
    return sources[name]


def teacher_specification(name: str) -> TeacherSpecification:
    if name not in TEACHERS:
        raise ValueError(f"teacher is '{name}'{suggest(name, list(TEACHERS))}")
    return TEACHERS[name]()


def _cross_entropy_and_kl(kl_share: float) -> Objective:
    if not 0 <= kl_share <= 1:
        raise ValueError(f"kl_share is {kl_share}: a share lies in [0, 1].")
    if kl_share == 0:
        return CrossEntropy()
    if kl_share == 1:
        return Divergence("forward_kl")
    return Weighted(((1 - kl_share, CrossEntropy()), (kl_share, Divergence("forward_kl"))))


METHODS: dict[str, Callable[..., Method]] = {
    function.__name__: function for function in (sft, kd, seqkd, gkd, promptkd)
}


def build_method(name: str, **options: Any) -> Method:
    """The method of a recipe: a name of ``METHODS`` or ``module:function``, with its options.

    Raises:
        UserError: for an unknown name or option (with the nearest known one), or a wrong value.
    """
    function = _method_function(name)
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise UserError(f"unknown key 'method.{option}'{suggest(option, list(known))}")
    try:
        method = function(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"method '{name}': {error}") from None
    if not isinstance(method, Method):
        raise UserError(f"method '{name}' returned {type(method).__name__}, not a promptkd Method.")
    return method


def _method_function(name: str) -> Callable[..., Method]:
    if ":" not in name:
        if name not in METHODS:
            raise UserError(f"unknown method '{name}'{suggest(name, list(METHODS))}")
        return METHODS[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"method '{name}' cannot be imported: {error}. Write module:function, "
            "with the module on the Python path."
        ) from None
