"""From a recipe to everything a run works with, checked on the way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from promptkd import kernels
from promptkd.adapters import add_lora
from promptkd.composition import Method
from promptkd.config import THE_STUDENT, Recipe
from promptkd.data import Dataset, steps_of_epochs
from promptkd.errors import UserError
from promptkd.findings import Finding
from promptkd.generation.generators import Generation
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.generation.vllm_engine import VLLMEngine
from promptkd.given import GivenModel
from promptkd.models.frozen import Storage
from promptkd.models.language_model import LanguageModel, proven
from promptkd.models.loaded_once import by_first
from promptkd.models.loading import (
    compute_dtype,
    dtype_of,
    embedding_rows,
    load_model,
    load_tokenizer,
    native_bf16,
    stop_ids,
)
from promptkd.models.objects import own_weights
from promptkd.models.sizes import num_parameters
from promptkd.models.vocabularies import same_tokenizer, same_weights, shared_vocabulary
from promptkd.ranks import Ranks
from promptkd.training import preflight
from promptkd.training.identity import Contents
from promptkd.training.launch import describe
from promptkd.training.learner import Learner
from promptkd.training.models import Models
from promptkd.training.requests import Requests, Say, read_requests
from promptkd.training.self_teacher import (
    refuse_moving_author,
    self_teacher,
)
from promptkd.training.step import Step, StepSettings
from promptkd.training.token_budget import Budget, measured_budget


@dataclass(frozen=True)
class Setup:
    """The parts of a run, ready for its first step.

    Attributes:
        about: on what the run works, as its first line and its record say.
        found: what the preflight measured.
        weights: digests of the models as they came, if they are sharded.
    """

    requests: Requests
    models: Models
    stop: tuple[int, ...]
    engine: Engine
    decoding: GenerationSettings
    generation: Generation
    step: Step
    max_steps: int
    about: dict[str, Any]
    found: dict[str, Any]
    contents_of_models: Contents

    def contents(self) -> Contents:
        """What a run learns from: a resumed one must find it as it was."""
        of_models = self.contents_of_models or self.models.contents()
        return self.requests.contents() | of_models | _ends(self.stop)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the models."""
        teacher = self.models.plain_teacher
        return {
            "steps": self.max_steps,
            "preflight": self.found,
            "student_parameters": num_parameters(self.models.student.module),
            "teacher_parameters": num_parameters(teacher.module) if teacher else None,
        }


@dataclass(frozen=True)
class LoadedPair:
    """What is known once the models are read and checked; see ``Setup``."""

    models: Models
    stop: tuple[int, ...]
    found: dict[str, Any]
    contents: Contents


def set_up(recipe: Recipe, method: Method, device: torch.device, ranks: Ranks, say: Say) -> Setup:
    """Load, check and bind what ``recipe`` and ``method`` ask for.

    Raises:
        UserError: for everything that can be known to be wrong before the first step.
    """
    if recipe.precision == "bf16" and not native_bf16(device):
        finding = "this CPU emulates bf16, about 10 times slower than fp32: set precision=auto."
        say(str(Finding("PK207", finding)))
    preflight.check_sampling(method, recipe.sampling)
    requests = read_requests(recipe, method, say)
    about = describe(requests.encoder, compute_dtype(recipe.precision, device), device, ranks)
    about |= {"kernels": recipe.kernels, "sharding": recipe.sharding}
    about |= {"engine": recipe.sampling.engine}
    say(", ".join(f"{name} {value}" for name, value in about.items()))
    preflight.check_sharding(recipe, ranks.number)
    preflight.check_batch(recipe.optimization.global_batch_size, len(requests.data), ranks.number)
    sharded = recipe.sharding == "fsdp"

    def load() -> LoadedPair:
        models = _load_models(*_as_loaded(recipe, device), method=method, requests=requests)
        if recipe.evaluation.exposure_bias_every_steps:
            preflight.check_exposure_bias(requests.validation, models.comparable, ranks.number)
        stop = _stop_set(requests, models, say)
        found = _check_pair(recipe, requests, models, stop, say)
        return LoadedPair(models, stop, found, contents=models.contents() if sharded else {})

    loaded = by_first(load) if sharded else load()
    models, stop = loaded.models, loaded.stop
    budget = _budget(recipe, models, requests.longest_row, ranks, say)
    if sharded:
        offload = bool(recipe.teacher and recipe.teacher.offload)
        models = models.shared_out(device, offload, stays=recipe.gathered_for == "step")
    generation = _bind_generation(recipe, method, models, requests, stop)
    step = _bind_step(recipe, method, models, ranks, budget)
    requests.say(say)
    return Setup(
        requests=requests,
        models=models,
        stop=stop,
        engine=generation.engine,
        decoding=generation.decoding,
        generation=generation,
        step=step,
        max_steps=_count_steps(recipe, requests.data),
        about=about,
        found=loaded.found,
        contents_of_models=loaded.contents,
    )


def contents(recipe: Recipe, method: Method, device: torch.device) -> Contents:
    """``Setup.contents`` of a run that takes no step: its data and models, and nothing else."""
    requests = read_requests(recipe, method, _unsaid)
    models = _load_models(*_as_loaded(recipe, device), method=method, requests=requests)
    stop = _stop_set(requests, models, _unsaid)
    return requests.contents() | models.contents() | _ends(stop)


def _unsaid(sentence: str) -> None:
    """What was said when the run began needs no saying."""


def _ends(stop: tuple[int, ...]) -> Contents:
    return {"ends of responses": {"ids": list(stop)}}


def _as_loaded(recipe: Recipe, device: torch.device) -> tuple[Recipe, torch.device]:
    """How and where models are loaded; those that are shared out: on the CPU, as for ``device``."""
    if recipe.sharding == "none":
        return recipe, device
    mixed = compute_dtype(recipe.precision, device) == torch.bfloat16
    settings: dict[str, Any] = {"precision": "bf16" if mixed else "fp32"}
    if recipe.teacher:  # what is offloaded then are its parts
        Storage(offload=recipe.teacher.offload).refuse_missing(device)
        settings["teacher"] = recipe.teacher.model_copy(update={"offload": False})
    return recipe.model_copy(update=settings), torch.device("cpu")


def _bind_generation(
    recipe: Recipe, method: Method, models: Models, requests: Requests, stop: tuple[int, ...]
) -> Generation:
    student, encoder = models.whole_student, requests.encoder
    engine: Engine = TransformersEngine(student, stop)
    if recipe.sampling.engine == "vllm":
        limits = encoder.max_request_tokens, encoder.max_response_tokens
        engine = VLLMEngine(student, stop, sum(limits), options=recipe.sampling.vllm)
    decoding = GenerationSettings.of_recipe(recipe)
    generation = Generation(engine, student, decoding=decoding, encoder=encoder, seed=recipe.seed)
    teacher = models.whole_teacher
    if teacher and any(term.rollouts.asks_teacher for term in method.terms):
        asks = requests.teacher_encoder or encoder
        with models.gathered(student=False):
            generation.add_teacher(teacher, models.teacher_tokenizer, requests.examples, asks)
    return generation


def _check_pair(
    recipe: Recipe, requests: Requests, models: Models, stop: tuple[int, ...], say: Say
) -> dict[str, Any]:
    sets = [dataset for dataset in (requests.data, requests.validation) if dataset]
    preflight.check_token_ids(sets, requests.tokenizer, models.student.vocabulary)
    return preflight.check_models(
        models.student,
        models.teacher if models.comparable else None,  # else it reads only texts
        requests.encoder,
        sets,
        stop=stop,
        names=(recipe.student.model, recipe.teacher_model() if recipe.teacher else ""),
        say=say,
    )


def _stop_set(requests: Requests, models: Models, say: Say) -> tuple[int, ...]:
    """Every token that ends a response: either model's, and the template's end of turn."""
    tokenizer, teacher = requests.tokenizer, models.plain_teacher
    own = {*stop_ids(tokenizer, models.student.module), requests.encoder.eos_token_id}
    if teacher is None or not models.comparable:
        return tuple(sorted(own))
    others = {*stop_ids(models.teacher_tokenizer, teacher.module)}
    others = {token for token in others if token < models.student.vocabulary}
    if others - own:
        ends = tokenizer.convert_ids_to_tokens(sorted(others - own))
        say(f"the teacher ends responses with {ends}, which ends the student's too from now on")
    return tuple(sorted(own | others))


def _load_models(
    recipe: Recipe, device: torch.device, method: Method, requests: Requests
) -> Models:
    """Student and teacher over the token ids that both have."""
    dtype, compiled = compute_dtype(recipe.precision, device), recipe.kernels == "compiled"
    module = _load_student(recipe, dtype, device)
    vocabulary = embedding_rows(module)
    plain_teacher, teacher, teacher_tokenizer, comparable = None, None, None, False
    average = None
    if recipe.teacher and (method.needs_teacher or requests.validation):
        name = recipe.teacher_model()
        teacher_tokenizer = load_tokenizer(name)
        if recipe.teacher.model == THE_STUDENT:
            refuse_moving_author(recipe.teacher, method)
            other, average = self_teacher(recipe.teacher, module, name, dtype, compiled)
        else:
            storage = Storage(recipe.teacher.quantization, recipe.teacher.offload)
            other = load_model(name, dtype, device, recipe.attention, storage, compiled)
            other.requires_grad_(False)
        rows = embedding_rows(other)
        tokenizers = requests.tokenizer, teacher_tokenizer
        comparable = same_tokenizer(*tokenizers)
        if method.compares_tokens or comparable:
            vocabulary = rows = shared_vocabulary(*tokenizers, module, other)
        alike = requests.teacher_encoder is None and not recipe.student.lora
        if recipe.teacher.model != THE_STUDENT and alike and same_weights(module, other):
            raise UserError(
                f"The student {recipe.student.model} has its teacher's weights: there is nothing "
                "to learn from it. Name another student, or make one: promptkd init-student.",
                "PK204",
            )
        plain_teacher = proven(LanguageModel(other, rows, dtype), f"the teacher {name}")
        if method.teacher is not None:
            if recipe.teacher.gradient_checkpointing:
                preflight.check_checkpointed(method.teacher)
                _checkpoint_gradients(other)
            teacher = method.teacher.build(plain_teacher, teacher_tokenizer)
            preflight.check_self_teacher(recipe.teacher, requests.teacher_encoder, teacher)
            preflight.check_gradient(teacher)
    student = LanguageModel(module, vocabulary, dtype)
    return Models(
        student=proven(student, f"the student {recipe.student.model}"),
        plain_teacher=plain_teacher,
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        comparable=comparable,
        saved_dtype=dtype_of(recipe.student.model),
        average=average,
    )


def _load_student(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    lora = recipe.student.lora
    own_dtype = dtype if lora else torch.float32
    compiled = recipe.kernels == "compiled"
    module = load_model(
        recipe.student.model, own_dtype, device, recipe.attention, compiled=compiled
    )
    if isinstance(recipe.student.model, GivenModel) and not lora:
        own_weights(module)
    if lora:
        add_lora(module, lora.r, lora.alpha, lora.target_modules, recipe.seed)
    if recipe.optimization.gradient_checkpointing:
        _checkpoint_gradients(module)
    if recipe.sharding == "none":  # else when it is shared out, to its device
        kernels.prepare_learner(module, device)
    return module


def _bind_step(
    recipe: Recipe, method: Method, models: Models, ranks: Ranks, budget: Budget
) -> Step:
    optimization, teacher = recipe.optimization, models.teacher
    adapted = teacher.parameters() if teacher else []
    if method.adaptation and not adapted:
        raise UserError(
            f"The method '{method.name}' adapts its teacher, but {method.teacher!r} has nothing "
            "to train. Use gkd with this teacher instead."
        )
    own = [parameter for parameter in models.student.module.parameters() if parameter.requires_grad]
    teacher_rate = optimization.teacher_learning_rate
    return Step(
        method,
        models.student,
        teacher,
        student_learner=_learner(own, recipe, optimization.learning_rate),
        teacher_learner=_learner(adapted, recipe, teacher_rate) if adapted else None,
        settings=StepSettings(
            micro_batch_tokens=budget.micro_batch,
            kept_tokens=budget.kept,
            max_grad_norm=optimization.max_grad_norm,
            teacher_step=optimization.teacher_step,
            compiled=recipe.kernels == "compiled",
        ),
        ranks=ranks,
    )


def _budget(recipe: Recipe, models: Models, longest: int, ranks: Ranks, say: Say) -> Budget:
    """The recipe's, or the micro-batches that fit here, rows of ``longest`` tokens among them."""
    given = recipe.optimization.micro_batch_tokens
    if given is not None:
        return Budget(given, kept=given)
    together = recipe.optimization.teacher_step == "with_student"
    return measured_budget(
        models.student, models.teacher, longest, together=together, ranks=ranks, say=say
    )


def _count_steps(recipe: Recipe, data: Dataset) -> int:
    optimization = recipe.optimization
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
    module.disable_input_require_grads()  # for adapters; only reentrant ones need it
    module.train()
