"""The library's verbs, as Python functions."""

from typing import Unpack

from promptkd.composition import Method
from promptkd.methods import build_method
from promptkd.objects import AnyRecipe, Objects, complete
from promptkd.run import TrainedRun
from promptkd.training.identity import AS_IT_WAS, Resuming
from promptkd.training.rehearsal import Rehearsal
from promptkd.training.trainer import Trainer


def train(
    recipe: AnyRecipe,
    method: Method | str | None = None,
    *,
    restart_from: int | None = None,
    allow_changes: bool = False,
    **objects: Unpack[Objects],
) -> TrainedRun:
    """Run a recipe to its end, or go on with it.

    Models and rows may come as objects; the recipe then needs no names of them. They aren't
    changed: a run trains a copy. The same call goes on with the run, or finds it finished.

    Args:
        recipe: what to do: validated, as nested dictionaries, or a file. ``max_steps`` or
            ``epochs`` of a run that was begun may have grown.
        method: in place of the recipe's; a name stands for the method with its defaults.
        restart_from: go back to the checkpoint of this step (0: the start), with other rates.
        allow_changes: go on though data, weights or settings differ; the record says so.
        objects: models and rows in place of names: ``student``, ``teacher``, ``tokenizer``,
            ``teacher_tokenizer``, ``train``, ``validation``, ``peft_config``, as
            ``promptkd.objects.Objects`` and docs/python.md say.

    Raises:
        UserError: for bad input, in one sentence; nothing that was saved is lost.
        Stopped: when Ctrl-C, SIGTERM or SIGUSR1 asked for an end; the run can go on.
    """
    trainer = _trainer(recipe, method, objects, Resuming(restart_from, allow_changes))
    trainer.run()
    return TrainedRun(trainer.directory.path, trainer.directory.asked)


def check(
    recipe: AnyRecipe,
    method: Method | str | None = None,
    **objects: Unpack[Objects],
) -> Rehearsal:
    """Prove that a recipe works before it runs: all that ``train`` checks, and its first steps.

    The steps are the run's own, on real rollouts; nothing is kept. The arguments are ``train``'s.

    Returns:
        ``steps``, ``epochs`` and ``output`` of the whole run, ``first``: the first step's line as
        in metrics.jsonl, ``preflight``: what was found about the pair, ``example``: the first row
        as the models see it, ``measured`` and ``forecast``: see ``training.forecast``,
        ``peak_memory`` and ``bytes_free`` on the disk.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """
    return _trainer(recipe, method, objects, AS_IT_WAS).rehearse()


def _trainer(
    recipe: AnyRecipe, method: Method | str | None, objects: Objects, resuming: Resuming
) -> Trainer:
    named = method if isinstance(method, str) else None
    whole = complete(recipe, objects, named)
    built = method if isinstance(method, Method) else None
    return Trainer(
        whole, built or build_method(whole.method.name, **whole.method.options), resuming
    )
