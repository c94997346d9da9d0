"""A recipe on machines that aren't at hand: what ``promptkd check --gpus`` says. Nothing runs."""

from collections.abc import Iterator
from dataclasses import dataclass

from promptkd import vllm_options
from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.errors import UserError
from promptkd.models.loading import text_config
from promptkd.numbers import duration
from promptkd.rollouts import Corpus, OfflineTeacher, Reference
from promptkd.teachers import FromTokens
from promptkd.training.sizing import (
    H100,
    USABLE,
    Plan,
    Shape,
    fits,
    kept_per_token,
    micro_batch_tokens,
    remedies,
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
        UserError: if a model's configuration can't be read, or cards are more than requests.
    """
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
    """The same for given shapes of student and teacher."""
    student, teacher = pair
    section, options = recipe.teacher if teacher else None, recipe.sampling.vllm
    request, response = recipe.data.max_request_tokens, recipe.data.longest_response
    adapts = method.adaptation is not None
    front = method.teacher.length if isinstance(method.teacher, FromTokens) else 0
    given = Reference | OfflineTeacher | Corpus
    return Plan(
        student=student,
        teacher=teacher,
        batch=recipe.optimization.global_batch_size,
        request=request,
        response=response,
        longest=request + response + front,
        adapts=adapts,
        together=recipe.optimization.teacher_step == "with_student",
        on_policy=any(not isinstance(term.rollouts, given) for term in method.terms),
        vllm_share=vllm_options.share(options) if recipe.sampling.engine == "vllm" else None,
        vllm_sleeps=vllm_options.sleeps(options),
        lora=recipe.student.lora is not None,
        quantization=section.quantization if section else None,
        offload=section.offload if section else False,
        checkpointed=recipe.optimization.gradient_checkpointing,
        teacher_checkpointed=section.gradient_checkpointing if section else False,
        sharded=recipe.sharding == "fsdp",
        ranks=cluster.gpus,
        memory=cluster.memory_gb * 1e9,
        device=cluster.device,
    )


def plan_lines(plan: Plan, max_steps: int | None) -> Iterator[str]:
    """What the equations of ``sizing`` say of a plan, for people."""
    held = standing_bytes(plan)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in held.items())
    how = "sharded" if plan.sharded else "replicas"
    yield (
        f"computed, not measured, for {plan.ranks} GPUs of {plan.memory / 1e9:.0f} GB, {how}; "
        f"rows of {plan.request:.0f} + {plan.response:.0f} tokens, the most that the recipe allows"
    )
    yield f"memory per card, GB: {parts}; together {sum(held.values()) / 1e9:.1f}"
    if written := writing_bytes(plan):
        what = "vLLM, which sleeps meanwhile" if plan.vllm else "a copy of the student, its cache"
        yield f"while writing, GB more: {written / 1e9:.1f} ({what})"
    tokens = micro_batch_tokens(plan)
    yield (
        f"a token keeps {kept_per_token(plan) / 1e6:.2f} MB, so a micro-batch has at most {tokens} "
        f"tokens of {USABLE:.0%} of the card; the longest row has {plan.longest}"
    )
    if not fits(plan):
        ways = remedies(plan)
        said = f" What helps: {', '.join(ways)}." if ways else " No key of the recipe helps."
        more = "More cards help." if plan.sharded else "More cards help only by sharding: fsdp."
        yield f"this does not fit.{said} {more}"
        return
    seconds = step_seconds(plan, H100)
    step = sum(seconds.values())
    parts = ", ".join(f"{phase} {own:.2f}" for phase, own in seconds.items())
    yield f"one step on H100s: {step:.1f} s ({parts}); {H100.source}"
    if max_steps:
        yield f"{max_steps} steps: about {duration(max_steps * step)}, evaluations aside"
    yield (
        f"of one card's speed, with as many rows each: {weak_scaling(plan, H100, plan.ranks):.0%} "
        "on each of these"
    )
