"""Which engine writes in a run: ``sampling.engine``, and what ``auto`` stands for."""

from typing import Any

from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import UserError
from promptkd.generation.vllm_engine import lacking_here
from promptkd.training.identity import recorded_engine


def with_engine(recipe: Recipe, method: Method, recorded: dict[str, Any] | None) -> Recipe:
    """The recipe with the name of an engine in place of ``auto``, as the run's record has it.

    A run goes on with the engine it began with. A new one takes vLLM on a GPU where it is
    installed, unless ``against_vllm`` or ``lacking_here`` says why not.

    Args:
        recorded: the identity of the run that is there, if there is one.

    Raises:
        UserError: for options of vLLM where transformers writes.
    """
    sampling = recipe.sampling
    if sampling.engine != "auto":
        return recipe
    if recorded is None:
        reason = against_vllm(recipe, method) or lacking_here()
        engine = "transformers" if reason else "vllm"
    else:
        engine = recorded_engine(recorded["recipe"])
        reason = "the run began with it"
    if engine == "transformers" and sampling.vllm:
        raise UserError(
            "sampling.vllm has options, but with engine: auto transformers writes here, because "
            f"{reason}. Leave them out, or set sampling.engine=vllm."
        )
    chosen = sampling.model_copy(update={"engine": engine})
    return recipe.model_copy(update={"sampling": chosen})


def against_vllm(recipe: Recipe, method: Method) -> str | None:
    """Why a run is better off without it on any machine; None if nothing is against it.

    What two models write together, token by token, transformers writes whatever the engine is;
    and an engine that writes for evaluations alone isn't worth a third of the card.
    """
    if recipe.vllm_cannot_write:
        return "sharding is fsdp"
    if not method.student_writes_alone:
        return f"the method '{method.name}' learns from nothing that the student writes alone"
    return None
