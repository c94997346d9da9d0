"""From a recipe to everything a run works with, checked on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from promptkd.adapters import add_lora
from promptkd.composition import Method
from promptkd.config import Recipe
from promptkd.data import (
    Dataset,
    Encoder,
    evaluation_set,
    read_examples,
    steps_of_epochs,
    training_set,
)
from promptkd.errors import UserError
from promptkd.generation.generators import Authors
from promptkd.generation.sampling import Decoding
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.generation.vllm_engine import VLLMEngine
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loading import (
    compute_dtype,
    embedding_rows,
    load_model,
    load_tokenizer,
    native_bf16,
    stop_ids,
)
from promptkd.models.vocabularies import same_tokenizer, shared_vocabulary
from promptkd.teachers import Teacher
from promptkd.training import preflight, token_budget
from promptkd.training.step import Learner, Step, SumOverRanks

Say = Callable[[str], None]


@dataclass(frozen=True)
class Assembly:
    """The parts of a run.

    Attributes:
        plain_teacher: the recipe's teacher as it came; None if there is none.
        teacher: the same, as the method uses it; None if the method doesn't.
        comparable: whether student and teacher share a token table, so KLs can be measured.
        found: what the preflight measured.
    """

    tokenizer: Any
    encoder: Encoder
    data: Dataset
    validation: Dataset | None
    student: LanguageModel
    plain_teacher: LanguageModel | None
    teacher: Teacher | None
    comparable: bool
    stop: tuple[int, ...]
    engine: Engine
    decoding: Decoding
    authors: Authors
    step: Step
    max_steps: int
    found: dict[str, Any]


def assemble(
    recipe: Recipe,
    method: Method,
    device: torch.device,
    num_ranks: int,
    sum_over_ranks: SumOverRanks,
    say: Say,
) -> Assembly:
    """Load, check and bind what ``recipe`` and ``method`` ask for.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """
    dtype = compute_dtype(recipe.precision, device)
    if recipe.precision == "bf16" and not native_bf16(device):
        say(
            "warning: precision is bf16, but this processor multiplies bf16 by emulation, about "
            "10 times slower than fp32; precision: auto avoids that"
        )
    tokenizer = load_tokenizer(recipe.student.model)
    encoder = Encoder.of_recipe(recipe, tokenizer)
    examples = read_examples(recipe.data.train)
    data = training_set(examples, encoder)
    validation = None
    if recipe.data.validation:
        held_out = read_examples(recipe.data.validation)[: recipe.evaluation.num_examples]
        validation = evaluation_set(held_out, encoder)
    preflight.check_data(
        method, data, validation, recipe.evaluation.metric, recipe.teacher is not None
    )
    lora = recipe.student.lora
    module: Any = load_model(recipe.student.model, dtype if lora else torch.float32, device)
    if lora:
        add_lora(module, lora.r, lora.alpha, lora.target_modules, recipe.seed)
    if recipe.optimization.gradient_checkpointing:
        _checkpoint_gradients(module)
    vocabulary = embedding_rows(module)
    plain_teacher, teacher, teacher_tokenizer, comparable = None, None, None, False
    if recipe.teacher and (method.needs_teacher or validation):
        teacher_tokenizer = load_tokenizer(recipe.teacher.model)
        teacher_module: Any = load_model(recipe.teacher.model, dtype, device)
        rows = embedding_rows(teacher_module)
        comparable = same_tokenizer(tokenizer, teacher_tokenizer)
        if method.compares_tokens or comparable:
            vocabulary = rows = shared_vocabulary(
                tokenizer, teacher_tokenizer, module, teacher_module
            )
        teacher_module.requires_grad_(False)
        name = recipe.teacher.model
        plain_teacher = proven(LanguageModel(teacher_module, rows, dtype), f"the teacher {name}")
        if method.teacher is not None:
            teacher = method.teacher.build(plain_teacher, teacher_tokenizer)
    if recipe.evaluation.exposure_bias_every_steps:
        preflight.check_exposure_bias(validation, comparable, num_ranks)
    student = LanguageModel(module, vocabulary, dtype)
    student = proven(student, f"the student {recipe.student.model}")
    names = (recipe.student.model, recipe.teacher.model if recipe.teacher else "")
    compared = teacher if comparable else None  # else it reads only texts, as its own tokens
    found = preflight.check_models(student, compared, tokenizer, encoder, data, names, say)
    stop = stop_ids(tokenizer, module)
    engine: Engine = TransformersEngine(student, stop)
    if recipe.sampling.engine == "vllm":
        longest = encoder.max_request_tokens + encoder.max_response_tokens
        engine = VLLMEngine(student, stop, longest)
    decoding = Decoding.of_recipe(recipe)
    authors = Authors(engine, student, decoding, encoder, recipe.seed)
    if plain_teacher and any(term.rollouts.asks_teacher for term in method.terms):
        authors.add_teacher(plain_teacher, teacher_tokenizer, examples)
    budget = recipe.optimization.micro_batch_tokens
    if budget is None:
        budget = _token_budget(student, teacher, encoder, num_ranks, say)
    say(f"training data: {data.summary()}")
    if validation:
        say(f"validation data: {validation.summary()}")
    return Assembly(
        tokenizer,
        encoder,
        data,
        validation,
        student,
        plain_teacher,
        teacher,
        comparable,
        stop,
        engine,
        decoding,
        authors,
        _bind_step(recipe, method, student, teacher, budget, sum_over_ranks),
        _count_steps(recipe, data, num_ranks),
        found,
    )


def _bind_step(
    recipe: Recipe,
    method: Method,
    student: LanguageModel,
    teacher: Teacher | None,
    budget: int,
    sum_over_ranks: SumOverRanks,
) -> Step:
    optimization = recipe.optimization
    adapted = teacher.parameters() if teacher else []
    if method.adaptation and not adapted:
        raise UserError(
            f"The method '{method.name}' adapts its teacher, but {method.teacher!r} has nothing "
            "to train. Use gkd with this teacher instead."
        )
    own = [parameter for parameter in student.module.parameters() if parameter.requires_grad]
    return Step(
        method,
        student,
        teacher,
        _learner(own, recipe, optimization.learning_rate),
        _learner(adapted, recipe, optimization.teacher_learning_rate) if adapted else None,
        micro_batch_tokens=budget,
        max_grad_norm=optimization.max_grad_norm,
        teacher_step=optimization.teacher_step,
        sum_over_ranks=sum_over_ranks,
    )


def _token_budget(
    student: LanguageModel, teacher: Teacher | None, encoder: Encoder, num_ranks: int, say: Say
) -> int:
    """Measured: what a token keeps in the models that learn, and what is free."""
    device = student.device
    learners: list[tuple[token_budget.Speak, LanguageModel]] = [(student.hidden_states, student)]
    if teacher and teacher.parameters():
        learners.append((teacher.hidden_states, teacher.model))
    per_token = sum(
        token_budget.bytes_per_token(speak, list(model.module.parameters()), device)
        for speak, model in learners
    )
    trained = sum(p.nbytes for p in student.module.parameters() if p.requires_grad)
    free = token_budget.free_memory(device) // (num_ranks if device.type == "cpu" else 1)
    longest = encoder.max_request_tokens + encoder.max_response_tokens
    longest += teacher.front_length if teacher else 0
    budget = token_budget.token_budget(per_token, 3 * trained, free, longest, device)
    say(
        f"micro_batch_tokens: {budget} ({free / 1e9:.1f} GB free, {per_token / 1e6:.2f} MB kept "
        "per token)"
    )
    return budget


def _count_steps(recipe: Recipe, data: Dataset, num_ranks: int) -> int:
    optimization = recipe.optimization
    if optimization.global_batch_size < num_ranks:
        raise UserError(
            f"global_batch_size {optimization.global_batch_size} is smaller than the number of "
            f"processes {num_ranks}: some would have nothing to do."
        )
    if optimization.max_steps is not None:
        return optimization.max_steps
    assert optimization.epochs is not None, "the recipe has exactly one of the two"
    return steps_of_epochs(optimization.epochs, len(data), optimization.global_batch_size)


def _learner(parameters: list[nn.Parameter], recipe: Recipe, rate: float) -> Learner:
    """AdamW with decoupled weight decay; biases and norms (one axis) are not decayed.

    The soft prompt has two axes and is decayed, as in the authors' code.
    """
    decay = recipe.optimization.weight_decay
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimization.optimizer == "sgd":
        return Learner(parameters, torch.optim.SGD(groups, lr=rate))
    return Learner(parameters, torch.optim.AdamW(groups, lr=rate, fused=True))


def _checkpoint_gradients(module: Any) -> None:
    """Recompute activations in backward; transformers does so in training mode only."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(part, name, None), float):  # OPT's are functional
                setattr(part, name, 0.0)
    module.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
