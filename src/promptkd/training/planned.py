"""A recipe on machines that aren't at hand: what ``promptkd check --gpus`` says. Nothing runs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from promptkd import vllm_options
from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import UserError
from promptkd.models.loading import text_config
from promptkd.numbers import duration
from promptkd.rollouts import Corpus, OfflineTeacher, Reference
from promptkd.teachers import FromTokens
from promptkd.training.engine import against_vllm
from promptkd.training.preflight import check_sharding
from promptkd.training.sizing import (
    H100,
    USABLE,
    Plan,
    Shape,
    fits,
    kept_per_token,
    micro_batch_tokens,
    standing_bytes,
    step_seconds,
    weak_scaling,
    writing_bytes,
)


@dataclass(frozen=True)
class Cluster:
    """Cards or, for the ``device`` cpu, processes; models are divided as the recipe says."""

    gpus: int
    memory_gb: float
    device: str = "cuda"


def plan_of(recipe: Recipe, method: Method, cluster: Cluster) -> Plan:
    """The recipe's pair and lengths, every request and response as long as it may be.

    Raises:
        UserError: if a model's configuration can't be read, or cards are more than requests, or one
            that is to share its models.
    """
    check_sharding(recipe, cluster.gpus)
    batch = recipe.optimization.global_batch_size
    if cluster.gpus > batch:
        raise UserError(
            f"global_batch_size {batch} is smaller than the {cluster.gpus} GPUs: some would have "
            "nothing to do. Raise it, or plan for fewer."
        )
    student, teacher = Shape.of_config(text_config(recipe.student.model)), None
    if recipe.teacher and method.needs_teacher:
        teacher = Shape.of_config(text_config(recipe.teacher_model()))
    return plan_for(recipe, method, (student, teacher), cluster)


def plan_for(
    recipe: Recipe, method: Method, pair: tuple[Shape, Shape | None], cluster: Cluster
) -> Plan:
    """The same for given shapes of student and teacher; on cards, with vLLM installed there."""
    student, teacher = pair
    section, options = recipe.teacher if teacher else None, recipe.sampling.vllm
    request, response = recipe.data.max_request_tokens, recipe.data.longest_response
    adapts = method.adaptation is not None
    front = method.teacher.length if isinstance(method.teacher, FromTokens) else 0
    given, engine = Reference | OfflineTeacher | Corpus, recipe.sampling.engine
    on_cards = cluster.device == "cuda" and against_vllm(recipe, method) is None
    by_vllm = engine == "vllm" or (engine == "auto" and on_cards)
    return Plan(
        student=student,
        teacher=teacher,
        batch=recipe.optimization.global_batch_size,
        request=request,
        response=response,
        longest=request + response + front,
        micro_batch=recipe.optimization.micro_batch_tokens,
        adapts=adapts,
        together=recipe.optimization.teacher_step == "with_student",
        on_policy=any(not isinstance(term.rollouts, given) for term in method.terms),
        vllm_share=vllm_options.share(options) if by_vllm else None,
        vllm_sleeps=vllm_options.sleeps(options),
        lora=recipe.student.lora is not None,
        quantization=section.quantization if section else None,
        offload=section.offload if section else False,
        checkpointed=recipe.optimization.gradient_checkpointing,
        teacher_checkpointed=section.gradient_checkpointing if section else False,
        sharded=recipe.sharding == "fsdp",
        gathered_for_step=recipe.gathered_for == "step",
        ranks=cluster.gpus,
        memory=cluster.memory_gb * 1e9,
        device=cluster.device,
    )


REMEDIES: dict[str, dict[str, Any]] = {
    "optimization.gradient_checkpointing=true": {"checkpointed": True},
    "teacher.gradient_checkpointing=true": {"teacher_checkpointed": True},
    "optimization.teacher_step=before_student": {"together": False},
    "sampling.vllm.enable_sleep_mode=true": {"vllm_sleeps": True},
    "teacher.quantization=8bit": {"quantization": "8bit"},
    "teacher.quantization=4bit": {"quantization": "4bit"},
    "teacher.offload=true": {"offload": True},
    "student.lora={}": {"lora": True},
    "gathered_for=pass": {"gathered_for_step": False},
}
"""Keys that take less memory, and what they change in a plan."""
STORAGE = ("teacher.quantization", "teacher.offload")


def remedies(plan: Plan) -> list[tuple[str, ...]]:
    """The smallest sets of keys that make it fit, all of one size; none if all of them don't."""
    usable = {
        key: change
        for key, change in REMEDIES.items()
        if any(getattr(plan, name) != value for name, value in change.items())
        and (plan.teacher or not key.startswith("teacher."))
        and (plan.adapts or not key.startswith("teacher.gradient"))
        and (plan.vllm or not key.startswith("sampling.vllm"))
        and not (plan.sharded and key.startswith("teacher.quantization"))
        and not ((plan.offload or plan.quantization) and key.startswith(STORAGE))
    }
    for number in range(1, len(usable) + 1):
        enough = []
        for keys in combinations(usable, number):
            changes: dict[str, Any] = {}
            for key in keys:
                changes |= usable[key]
            one_storage = sum(key.startswith(STORAGE) for key in keys) <= 1
            if one_storage and fits(replace(plan, **changes)):
                enough.append(keys)
        if enough:
            return enough
    return []


def _advice(plan: Plan) -> str:
    """What makes it fit, in sentences."""
    said, ways = [], remedies(plan)
    if not ways:
        said.append("No keys of the recipe make it fit as it is shared out here.")
    elif len(ways[0]) == 1:
        one = "This makes" if len(ways) == 1 else "Each of these makes"
        said.append(f"{one} it fit: {', '.join(key for (key,) in ways)}.")
    else:
        said.append(f"Together these make it fit: {', '.join(ways[0])}.")
    if plan.sharded:
        said.append("More cards help.")
    elif plan.ranks > 1 and not plan.quantization and fits(_shared(plan)):
        said.append(
            "On these cards sharding=fsdp makes it fit: it divides both models (the student then "
            "writes with sampling.engine=transformers)."
        )
    else:
        said.append("More cards help only with sharding=fsdp, which divides both models.")
    return " ".join(said)


def _shared(plan: Plan) -> Plan:
    return replace(plan, sharded=True, vllm_share=None)


def plan_lines(plan: Plan, max_steps: int | None) -> Iterator[str]:
    """What the equations of ``sizing`` say of a plan, for people."""
    cards = f"{plan.ranks} GPU{'s' * (plan.ranks > 1)} of {plan.memory / 1e9:.0f} GB"
    how = "" if plan.ranks == 1 else ", sharded" if plan.sharded else ", replicas"
    yield (
        f"computed, not measured, for {cards}{how}; rows of {plan.request:.0f} + "
        f"{plan.response:.0f} tokens, the most that the recipe allows"
    )
    yield from _memory_lines(plan)
    at_once = replace(plan, gathered_for_step=True)
    if plan.sharded and plan != at_once and fits(at_once):
        yield "gathered_for=step, which gathers each layer once a step and is faster, fits too"
    if not fits(plan):
        yield f"this does not fit. {_advice(plan)}"
        return
    seconds = step_seconds(plan, H100)
    step = sum(seconds.values())
    parts = ", ".join(f"{phase} {own:.2f}" for phase, own in seconds.items())
    on = "an H100" if plan.ranks == 1 else "H100s"
    yield f"one step on {on}: {step:.1f} s ({parts}); {H100.source}"
    if max_steps:
        yield f"{max_steps} steps: about {duration(max_steps * step)}, evaluations aside"
    if plan.ranks > 1 and fits(replace(plan, ranks=1, batch=plan.rows)):
        share = weak_scaling(plan, H100, plan.ranks)
        yield f"of one card's speed, with as many rows each: {share:.0%} on each of these"


def _memory_lines(plan: Plan) -> Iterator[str]:
    held = standing_bytes(plan)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in held.items())
    yield f"memory per card, GB: {parts}; together {sum(held.values()) / 1e9:.1f}"
    if plan.offload and plan.teacher:
        waits = 2 * plan.teacher.trunk / (plan.ranks if plan.sharded else 1)
        yield f"in the machine's memory, for each card: the teacher's layers, {waits / 1e9:.1f} GB"
    if written := writing_bytes(plan):
        copied = "" if plan.lora and not plan.sharded else ", and a copy of the student"
        what = "vLLM, which sleeps meanwhile" if plan.vllm else f"keys and values{copied}"
        yield f"while writing, GB more: {written / 1e9:.1f} ({what})"
    keeps, most = kept_per_token(plan) / 1e6, micro_batch_tokens(plan)
    if not most:
        yield f"a token keeps {keeps:.2f} MB, for which {USABLE:.0%} of the card leaves no room"
        return
    yield (
        f"a token keeps {keeps:.2f} MB, so a micro-batch has at most {most} tokens of {USABLE:.0%} "
        f"of the card; the longest row has {plan.longest}"
    )
    if plan.micro_batch and plan.micro_batch > most >= plan.longest:
        yield (
            f"optimization.micro_batch_tokens is {plan.micro_batch}, more than that: set it to "
            f"{most} at most"
        )
