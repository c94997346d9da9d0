"""promptkd: distil a large generative language model into a small one.

    import promptkd as pk

    done = pk.distill("HuggingFaceTB/SmolLM2-135M-Instruct", "train.jsonl", "runs/first", layers=20)
    result = pk.evaluate(done.run, "test.jsonl", seeds=(10, 20, 30, 40, 50))
    print(result.scores.rouge_l)

Every command is a function here; three have a verb in front, since the folders ``report``,
``judge`` and ``study`` have their names: ``write_report``, ``judge_responses``, ``run_study``.
Models and rows may be objects as well as names, and results print as the commands print them:
docs/python.md. Names are imported when used, so that ``import promptkd`` answers at once.
"""

import importlib
import inspect
from importlib import metadata
from typing import TYPE_CHECKING, Any

from promptkd.errors import UserError, in_a_sentence

if TYPE_CHECKING:
    from promptkd import divergences, methods, objectives, rollouts, teachers
    from promptkd.api import check, train
    from promptkd.composition import Method, Term
    from promptkd.config import load_recipe, recipe_from_dict
    from promptkd.distillation.distill import distill
    from promptkd.evaluation.comparison import compare
    from promptkd.evaluation.evaluate import evaluate, evaluate_with
    from promptkd.evaluation.exposure_bias import exposure_bias
    from promptkd.evaluation.lm_harness import lm_eval
    from promptkd.evaluation.prompt_analysis import prompt_analysis
    from promptkd.evaluation.rescoring import rescore
    from promptkd.evaluation.side_by_side import generate
    from promptkd.judge.judge import judge as judge_responses
    from promptkd.pruning import init_student
    from promptkd.report.report import report as write_report
    from promptkd.run import TrainedRun
    from promptkd.study.file import load_study
    from promptkd.study.run import run_study

_HOMES = {
    "check": "promptkd.api:check",
    "compare": "promptkd.evaluation.comparison:compare",
    "distill": "promptkd.distillation.distill:distill",
    "evaluate": "promptkd.evaluation.evaluate:evaluate",
    "evaluate_with": "promptkd.evaluation.evaluate:evaluate_with",
    "exposure_bias": "promptkd.evaluation.exposure_bias:exposure_bias",
    "generate": "promptkd.evaluation.side_by_side:generate",
    "init_student": "promptkd.pruning:init_student",
    "judge_responses": "promptkd.judge.judge:judge",
    "lm_eval": "promptkd.evaluation.lm_harness:lm_eval",
    "load_recipe": "promptkd.config:load_recipe",
    "load_study": "promptkd.study.file:load_study",
    "Method": "promptkd.composition:Method",
    "prompt_analysis": "promptkd.evaluation.prompt_analysis:prompt_analysis",
    "recipe_from_dict": "promptkd.config:recipe_from_dict",
    "rescore": "promptkd.evaluation.rescoring:rescore",
    "run_study": "promptkd.study.run:run_study",
    "Term": "promptkd.composition:Term",
    "TrainedRun": "promptkd.run:TrainedRun",
    "train": "promptkd.api:train",
    "write_report": "promptkd.report.report:report",
}
_MODULES = ("methods", "divergences", "objectives", "rollouts", "teachers")

__all__ = [
    "Method",
    "Term",
    "TrainedRun",
    "UserError",
    "check",
    "compare",
    "distill",
    "divergences",
    "evaluate",
    "evaluate_with",
    "exposure_bias",
    "generate",
    "init_student",
    "judge_responses",
    "lm_eval",
    "load_recipe",
    "load_study",
    "methods",
    "objectives",
    "prompt_analysis",
    "recipe_from_dict",
    "rescore",
    "rollouts",
    "run_study",
    "teachers",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if inspect.isfunction(found):
            found = in_a_sentence(found)
            found.__module__, found.__qualname__ = __name__, name  # by which pickle finds it
            globals()[name] = found
        return found
    if name in _MODULES:
        return importlib.import_module(f"promptkd.{name}")
    if name == "__version__":
        return metadata.version("promptkd")
    raise AttributeError(f"module 'promptkd' has no attribute '{name}'")


def __dir__() -> list[str]:
    hidden = (name for name in globals() if name.startswith("__"))
    return sorted({*__all__, "__version__", *hidden})
