"""promptkd: distil a large generative language model into a small one.

    import promptkd as pk

    pk.distill("gpt2-xl", "dolly.jsonl", "runs/dolly", layers=24)
    scores = pk.evaluate("runs/dolly/promptkd", "self_instruct.jsonl", seeds=(10, 20, 30, 40, 50))

Names are imported when used, so that ``import promptkd`` and the command line answer at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from promptkd.errors import UserError

if TYPE_CHECKING:
    from promptkd import divergences, methods, objectives, rollouts, teachers
    from promptkd.api import check, train
    from promptkd.composition import Method, Term
    from promptkd.distillation.distill import distill
    from promptkd.evaluation.evaluate import evaluate
    from promptkd.pruning import init_student

_HOMES = {
    "check": "promptkd.api",
    "distill": "promptkd.distillation.distill",
    "train": "promptkd.api",
    "evaluate": "promptkd.evaluation.evaluate",
    "init_student": "promptkd.pruning",
    "Method": "promptkd.composition",
    "Term": "promptkd.composition",
}
_MODULES = ("methods", "divergences", "objectives", "rollouts", "teachers")

__all__ = [
    "Method",
    "Term",
    "UserError",
    "check",
    "distill",
    "divergences",
    "evaluate",
    "init_student",
    "methods",
    "objectives",
    "rollouts",
    "teachers",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"promptkd.{name}")
    raise AttributeError(f"module 'promptkd' has no attribute '{name}'")
