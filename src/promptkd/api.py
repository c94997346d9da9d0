"""The library's verbs, as Python functions."""

from pathlib import Path
from typing import Any

from promptkd.composition import Method
from promptkd.config import MethodSection, Recipe
from promptkd.methods import build_method
from promptkd.training.identity import AS_IT_WAS, Resuming
from promptkd.training.trainer import Trainer


def train(
    recipe: Recipe,
    method: Method | str | None = None,
    *,
    restart_from: int | None = None,
    allow_changes: bool = False,
) -> Path:
    """Run a recipe to its end, or go on with it; returns the run directory.

    Args:
        recipe: what to do. ``max_steps`` or ``epochs`` of a run that was begun may have grown.
        method: in place of the recipe's; a name stands for the method with its defaults.
        restart_from: go back to the checkpoint of this step (0: the start), with other rates.
        allow_changes: go on though data, weights or settings differ; the record says so.

    Raises:
        UserError: for bad input, in one sentence; nothing that was saved is lost.
        Stopped: when Ctrl-C, SIGTERM or SIGUSR1 asked for an end; the run can go on.
    """
    trainer = _trainer(recipe, method, Resuming(restart_from, allow_changes))
    trainer.run()
    return trainer.directory.path


def check(recipe: Recipe, method: Method | str | None = None) -> dict[str, Any]:
    """Prove that a recipe works before it runs: all that ``train`` checks, and its first steps.

    The steps are the run's own, on real rollouts; nothing is kept.

    Returns:
        ``steps`` and ``epochs`` of the whole run, ``first``: the first step's line as in
        metrics.jsonl, ``preflight``: what was found about the pair, ``example``: the first row as
        the models see it, ``measured`` and ``forecast``: see ``training.forecast``,
        ``peak_memory`` and ``bytes_free`` on the disk.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """
    return _trainer(recipe, method).rehearse()


def _trainer(
    recipe: Recipe, method: Method | str | None, resuming: Resuming = AS_IT_WAS
) -> Trainer:
    if isinstance(method, str):
        recipe = recipe.model_copy(update={"method": MethodSection(name=method)})
        method = None
    built = method or build_method(recipe.method.name, **recipe.method.options)
    return Trainer(recipe, built, resuming)
