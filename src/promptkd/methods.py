"""Every method: who generates the responses x what is minimised x what happens to the teacher.

p is the teacher, q the student. The parameters of each function are the options of a recipe;
``teacher_options`` are the fields of the teacher's class in ``composition.TEACHERS``. Where a paper
and its code disagree, the docstring says which one is followed.

    method     responses from                  minimised at each token        teacher
    sft        the data                        -log q                         none
    kd         the data                        1/2 -log q + 1/2 KL(p || q)    frozen
    seqkd      the teacher, once               -log q                         frozen
    imitkd     data, then more and more q      KL(p || q)                     frozen
    gkd        q (or the data)                 any divergence                 frozen
    minillm    q with a share of p             KL(q || p), policy gradient    frozen
    distillm   the data or q, from a buffer    skewed KL                      frozen
    distillm2  p and q, one response each      skewed KL, one direction each  frozen
    akl        the data                        KL(p || q) and KL(q || p)      frozen
    abkd       the data (or q)                 alpha-beta divergence          frozen
    taid       the data (or q)                 KL(p_t || q)                   walks from q to p
    opd        q                               log q - log p, sampled token   frozen
    opsd       q                               JSD of p(.|c, x) and q         frozen, knows c
    sdft       q                               KL(q || p(.|c, x))             frozen, knows c
    opcd       q                               KL(q || p(.|c, x))             frozen, knows c
    promptkd   q                               KL(q || p_P)                   soft prompt P learns
    promptkd_half  q, for half of the requests, else the data; the rest as in promptkd
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec

from pydantic import ConfigDict, ValidationError, validate_call

from promptkd.composition import (
    Method,
    Term,
    cross_entropy_and_kl,
    source,
    teacher_specification,
    with_sft,
)
from promptkd.errors import UserError
from promptkd.keys import function_named, option_faults, refuse_look_alikes, suggest
from promptkd.objectives import (
    CrossEntropy,
    Divergence,
    PolicyGradient,
    SampledToken,
    Weighted,
    options_of,
)
from promptkd.replay import AdaptiveReplay, Repeated
from promptkd.rollouts import Corpus, Mixture, OfflineTeacher, Reference, Student, TeacherMixed
from promptkd.teachers import Adaptation, Frozen, Interpolated

METHODS: dict[str, Callable[..., Method]] = {}

Options = ParamSpec("Options")


def _method(function: Callable[Options, Method]) -> Callable[Options, Method]:
    """Put a method into ``METHODS``, and what it is called with into the method."""

    @functools.wraps(function)
    def recorded(*args: Options.args, **kwargs: Options.kwargs) -> Method:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        return replace(function(*args, **kwargs), options=given)

    METHODS[function.__name__] = recorded
    return recorded


@_method
def sft() -> Method:
    """Supervised fine-tuning: -log q on the reference responses."""
    return Method("sft", (Term(Reference(), CrossEntropy()),))


@_method
def kd(kl_share: float = 0.5, rollouts: str = "reference") -> Method:
    """Word-level distillation: (1 - kl_share) cross-entropy + kl_share KL(p || q).

    Source: Hinton et al. 2015; kl_share 0.5 as in MiniLLM's and PromptKD's scripts.
    """
    return Method("kd", (Term(source(rollouts), cross_entropy_and_kl(kl_share)),), Frozen())


@_method
def seqkd(kl_share: float = 0.0) -> Method:
    """Sequence-level distillation: -log q on responses the teacher wrote once, off-line.

    Sampled at the run's decoding settings rather than by beam search. kl_share 0.5 gives the
    mixture with KL(p || q) of MiniLLM's and PromptKD's scripts.

    Source: Kim and Rush 2016, arXiv:1606.07947.
    """
    return Method("seqkd", (Term(OfflineTeacher(), cross_entropy_and_kl(kl_share)),), Frozen())


@_method
def imitkd(start_share: float = 0.0, final_share: float = 1.0) -> Method:
    """Imitation learning: KL(p || q) on the data's text, then more and more on the student's own.

    The student's share of the requests goes linearly from start_share to final_share; the paper
    lets the data's share fall. DistiLLM's script of this name uses the student's text always, from
    a buffer: start_share 1 is nearest to it.

    Source: Lin et al. 2020, arXiv:2009.07253.
    """
    writer = Mixture(start_share, final_share)
    return Method("imitkd", (Term(writer, Divergence("forward_kl")),), Frozen())


@_method
def gkd(
    student_share: float = 1.0,
    divergence: str = "reverse_kl",
    beta: float | None = None,
    skew: float | None = None,
    teacher: str = "frozen",
    teacher_options: dict[str, Any] | None = None,
    sft_share: float = 0.0,
) -> Method:
    """Generalised distillation: any divergence, on the student's text with prob. student_share.

        L = (1 - sft_share) D(q, p) + sft_share (-log q on the references of the same requests)

    The defaults are the row called GKD in PromptKD's tables: student_share 1, reverse KL. The GKD
    paper's own choices include student_share 0.5 with divergence generalized_jsd, beta 0.5.

    Source: Agarwal et al. 2023, arXiv:2306.13649.
    """
    writer = Student() if student_share == 1 else Mixture(student_share)
    objective = Divergence(divergence, options_of(beta=beta, skew=skew))
    specification = teacher_specification(teacher, teacher_options)
    return Method("gkd", with_sft(Term(writer, objective), sft_share), specification)


@_method
def minillm(
    teacher_share: float = 0.2, inner_epochs: int = 4, clip: float = 0.2, corpus: str | None = None
) -> Method:
    """Reverse KL of whole responses: one step exactly, what comes later by policy gradient.

        L_t = KL(q || p) - min(w A, clip(w) A),  w = q(y_t) / p~(y_t),  A = what comes after t
        y ~ p~ = share p + (1 - share) q,        A = mean over t' > t of log p(y_t') / q(y_t')

    The responses serve inner_epochs optimizer steps. ``corpus``, a text file with a passage a line,
    adds the paper's language-modelling loss on plain text, with weight 1.

    The paper is followed. Its code lets A include step t, though the one-step part has it already,
    discounts by 0.95, doubles, and whitens A over the batch, and adds 1/2 KL(p || q) on the corpus.
    As in the code, w doesn't weigh the one-step part: given the prefix, w is 1 on average.

    Source: Gu et al. 2023, arXiv:2306.08543, section 2.2.
    """
    writer = Repeated(TeacherMixed(teacher_share), inner_epochs)
    objective = Weighted(((1.0, Divergence("reverse_kl")), (1.0, PolicyGradient(clip))))
    terms = [Term(writer, objective)]
    if corpus is not None:
        terms.append(Term(Corpus(corpus), CrossEntropy()))
    return Method("minillm", tuple(terms), Frozen())


@_method
def distillm(
    divergence: str = "skew_forward_kl",
    skew: float = 0.1,
    student_share: float = 0.0,
    capacity: int = 125,
) -> Method:
    """Skewed KL on the data's text or the student's, as the validation loss asks for it.

    student_share is where the adaptive share starts, capacity the buffer's in steps (see
    ``AdaptiveReplay``). The gradient goes through the student's part of the mixture, as the paper
    has it, and the first token of a sampled response counts, which the code leaves out.

    Source: Ko et al. 2024, arXiv:2402.03898, Eq. 3 and section 3.2.
    """
    objective = Divergence(divergence, options_of(skew=skew))
    return Method("distillm", (Term(AdaptiveReplay(student_share, capacity), objective),), Frozen())


@_method
def distillm2(skew: float = 0.1, beta: float = 1.0) -> Method:
    """Contrastive pairs: (2 - beta)/2 skew forward KL on p's text + beta/2 skew reverse KL on q's.

    The paper's weights are (1 - beta)/2 and beta/2 with a beta that grows; the released code has
    2 - beta and beta with beta 1 fixed and skew 0.1 fixed, which is followed here, halved as in the
    paper. The student generates anew at each step instead of once per epoch, and the mixture of the
    reverse part carries gradient, as the formula has it; the code detaches it.

    Source: Ko et al. 2025, arXiv:2503.07067, Eq. 5 and section 3.
    """
    if not 0 <= beta <= 2:
        raise ValueError(f"beta is {beta}: the weights (2 - beta)/2 and beta/2 ask for [0, 2].")
    options = options_of(skew=skew)
    terms = (
        Term(OfflineTeacher(), Divergence("skew_forward_kl", options), 1 - beta / 2),
        Term(Student(), Divergence("skew_reverse_kl", options), beta / 2),
    )
    return Method("distillm2", terms, Frozen())


@_method
def akl(head_mass: float = 0.5, rollouts: str = "reference") -> Method:
    """Forward and reverse KL, weighted by where the student is wrong: in the head or the tail.

    Source: Wu et al. 2024, arXiv:2404.02657; see ``divergences.adaptive_kl`` for its re-uses.
    """
    objective = Divergence("adaptive_kl", options_of(head_mass=head_mass))
    return Method("akl", (Term(source(rollouts), objective),), Frozen())


@_method
def abkd(alpha: float = 0.2, beta: float = 0.7, rollouts: str = "reference") -> Method:
    """Alpha-beta divergence: alpha says how much the teacher's mass counts, beta the student's.

    alpha 1, beta 0 is kd without cross-entropy (KL(p || q)); alpha 0, beta 1 is KL(q || p), which
    with rollouts="student" is gkd. The paper also combines it with the other sources of text.

    Source: Wang et al. 2025, arXiv:2505.04560; see ``divergences.alpha_beta``.
    """
    objective = Divergence("alpha_beta", options_of(alpha=alpha, beta=beta))
    return Method("abkd", (Term(source(rollouts), objective),), Frozen())


@_method
def taid(
    start: float = 0.4,
    end: float = 1.0,
    step_size: float = 5e-4,
    momentum: float = 0.99,
    rollouts: str = "reference",
) -> Method:
    """KL(p_t || q) to a target that walks from the student to the teacher while t grows.

    With rollouts="student" it is a student-friendly teacher without anything trained in it.

    Source: Shing et al. 2025, arXiv:2501.16937; see ``teachers.Interpolated`` for the rule.
    """
    specification = Interpolated(start, end, step_size=step_size, momentum=momentum)
    return Method("taid", (Term(source(rollouts), Divergence("forward_kl")),), specification)


@_method
def opd() -> Method:
    """On-policy distillation from the sampled token alone; gkd's default in expectation.

    Source: Thinking Machines, on-policy distillation, 2025; see ``objectives.SampledToken``.
    """
    return Method("opd", (Term(Student(), SampledToken()),), Frozen())


@_method
def opsd(
    divergence: str = "generalized_jsd", beta: float | None = None, skew: float | None = None
) -> Method:
    """On-policy self-distillation: a solution that only the teacher reads, JSD to the student.

        L = JSD_1/2(p_0(.|x, c), q(.|x)),   y ~ q(.|x)

    c is a worked solution (teacher.context), p_0 the student as it started (teacher.model: student,
    which is the paper's choice; any other teacher of the student's tokenizer works too). beta 1/2
    is generalized_jsd's default. The paper also clips the divergence of single tokens, which is
    left out here.

    Source: OPSD, arXiv:2601.18734.
    """
    objective = Divergence(divergence, options_of(beta=beta, skew=skew))
    return Method("opsd", (Term(Student(), objective),), Frozen(), needs_context=True)


@_method
def sdft(
    divergence: str = "reverse_kl", beta: float | None = None, skew: float | None = None
) -> Method:
    """Self-distillation fine-tuning: who has read a demonstration teaches who hasn't.

        L = KL(q(.|x) || p(.|x, c)),   y ~ q(.|x)

    c is a demonstration, usually the row's reference (teacher.context, or response in
    teacher.context_template), p the student's moving average (teacher.model: student, follow: ema)
    or the student itself (follow: live). The gradient is exact over the vocabulary. There are
    implementations with KL(p || q) instead: divergence forward_kl.

    Source: SDFT, arXiv:2601.19897.
    """
    objective = Divergence(divergence, options_of(beta=beta, skew=skew))
    return Method("sdft", (Term(Student(), objective),), Frozen(), needs_context=True)


@_method
def opcd() -> Method:
    """On-policy context distillation: the student learns to act as if it had read c.

        L = KL(q(.|x) || p(.|c, x)),   y ~ q(.|x)

    c is a system prompt (teacher.system) or experience (teacher.context). It is gkd's default over
    such a teacher, which may be a larger model or the student as it started.

    Source: OPCD, arXiv:2602.12275.
    """
    terms = (Term(Student(), Divergence("reverse_kl")),)
    return Method("opcd", terms, Frozen(), needs_context=True)


@_method
def promptkd(
    length: int = 7,
    init: str = "text",
    init_text: str = "Suppose you are a student.",
    regularizer: float = 1.0,
    anneal: bool = True,
    rollouts: str = "student",
    student_share: float | None = None,
    divergence: str = "reverse_kl",
    beta: float | None = None,
    skew: float | None = None,
    adaptation_divergence: str = "reverse_kl",
    regularizer_divergence: str = "reverse_kl",
    teacher: str = "soft_prompt",
    teacher_options: dict[str, Any] | None = None,
    sft_share: float = 0.0,
) -> Method:
    """The teacher's soft prompt learns to be understood; the student learns from that teacher.

        L_prompt  = KL(p_P || q) + regularizer (K - k)/K KL(p_P || p)     moves P
        L_student = KL(q || p_P)                                          moves q

    anneal=False keeps the regulariser's weight to the end, without (K - k)/K, unlike the paper.
    sft_share weighs -log q on the references of the same requests into L_student, as in ``gkd``.
    teacher="lora" or "prefix" adapts the teacher by other means (Table 9); length and init belong
    to the soft prompt and the prefix. Where the recipe gives the teacher a context (teacher.context
    or teacher.system), p_P and p have both read it: the method over a teacher that knows more.

    Source: Kim, Jang and Yang 2024, arXiv:2402.12842, Eq. 1-4; ablations: appendix D.
    """
    front = {"length": length, "init": init, "init_text": init_text}
    given = front if teacher in ("soft_prompt", "prefix") else {}
    specification = teacher_specification(teacher, {**given, **(teacher_options or {})})
    moving = Divergence(adaptation_divergence), Divergence(regularizer_divergence)
    adaptation = Adaptation(*moving, regularizer=regularizer, anneal=anneal)
    objective = Divergence(divergence, options_of(beta=beta, skew=skew))
    terms = with_sft(Term(source(rollouts, student_share), objective), sft_share)
    return Method("promptkd", terms, specification, adaptation=adaptation)


@_method
def promptkd_half() -> Method:
    """PromptKD in which each request has, with probability 1/2 a step, the reference's text.

        L_prompt, L_student of promptkd,   y ~ q(.|x)  or  y = the reference, 1/2 each

    What ``promptkd distill`` does where there are references: ``promptkd`` with rollouts="mixture",
    where another share or prompt can be set.

    Source: measured here, docs/promptkd-half.md.
    """
    return replace(promptkd(rollouts="mixture"), name="promptkd_half")


def build_method(name: str, **options: Any) -> Method:
    """The method of a recipe: a name of ``METHODS`` or ``module:function``, with its options.

    Raises:
        UserError: for an unknown name or option (with the nearest known one), or a wrong value.
    """
    function = _method_function(name)
    known = inspect.signature(function).parameters
    for option, value in options.items():
        if option not in known:
            nearest = suggest(option, list(known)) if known else f"; '{name}' has no options"
            raise UserError(f"unknown key 'method.{option}'{nearest}")
        try:
            refuse_look_alikes(value, known[option].annotation)
        except ValueError as error:
            raise UserError(f"'method.{option}' is {value!r}: {error}.") from None
    checked = validate_call(config=ConfigDict(allow_inf_nan=False))(function)
    try:
        method = checked(**options)
    except ValidationError as error:
        raise UserError(option_faults(error, "method.")) from None
    except (ValueError, TypeError, UserError) as error:
        blamed = [f"method.{key}" for key, value in options.items() if f"'{value}'" in str(error)]
        key = blamed[0] if len(blamed) == 1 else f"method '{name}'"
        raise UserError(f"{key}: {error}") from None
    if not isinstance(method, Method):
        raise UserError(f"method '{name}' returned {type(method).__name__}, not a promptkd Method.")
    return method


def _method_function(name: str) -> Callable[..., Method]:
    if ":" not in name:
        if name not in METHODS:
            raise UserError(f"unknown method '{name}'{suggest(name, list(METHODS))}")
        return METHODS[name]
    return function_named(name, "method", "that returns a promptkd Method")
