"""The library's verbs, as Python functions."""

from pathlib import Path
from typing import Any

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.methods import build_method
from promptkd.training.trainer import Trainer


def train(recipe: Recipe, method: Method | None = None) -> Path:
    """Run a recipe to its end, or go on with it; returns the run directory.

    Raises:
        UserError: for bad input, in one sentence; nothing that was saved is lost.
    """
    trainer = _trainer(recipe, method)
    trainer.run()
    return trainer.directory.path


def check(recipe: Recipe, method: Method | None = None) -> dict[str, Any]:
    """Prove that a recipe works before it runs: all that ``train`` checks, and one step.

    The step is the first of the run, on real rollouts; nothing is saved.

    Returns:
        ``steps`` of the whole run, ``first``: the step's line as in metrics.jsonl, ``preflight``:
        what was found about the pair.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """
    return _trainer(recipe, method).rehearse()


def _trainer(recipe: Recipe, method: Method | None) -> Trainer:
    return Trainer(recipe, method or build_method(recipe.method.name, **recipe.method.options))
