r"""A method of one's own: its objective, and the composition around it.

From this directory, or with it on PYTHONPATH, and with the options of the function below:

    promptkd train ../recipes/smollm2-135m.yaml method.name=custom_method:confident \
        method.anchor=0.2 output=runs/confident

In Python, ``promptkd.train(recipe, method=confident(anchor=0.2))`` is the same.
"""

from dataclasses import dataclass
from typing import ClassVar

from promptkd.composition import Method, Term
from promptkd.divergences import reverse_kl
from promptkd.objectives import CrossEntropy, Divergence, TokenView
from promptkd.rollouts import Reference, Student
from promptkd.teachers import Adaptation, SoftPrompt


@dataclass(frozen=True)
class ConfidentReverseKL:
    """max_v p(v) KL(q || p): the student follows where the teacher is sure of itself."""

    needs_teacher: ClassVar[bool] = True
    annotations: ClassVar[tuple[str, ...]] = ()

    def __call__(self, view: TokenView):
        return view.target.amax(-1).exp() * reverse_kl(view.student, view.target)


def confident(length: int = 7, anchor: float = 0.1) -> Method:
    """PromptKD weighed by the teacher's confidence, with a share of cross-entropy on references."""
    terms = (
        Term(Student(), ConfidentReverseKL(), 1 - anchor),
        Term(Reference(), CrossEntropy(), anchor),
    )
    adaptation = Adaptation(Divergence("reverse_kl"), Divergence("reverse_kl"), regularizer=1.0)
    return Method("confident", terms, teacher=SoftPrompt(length), adaptation=adaptation)
