"""The recipe: what a user writes in YAML, validated when read. Imports no torch.

Keys follow Hugging Face's names where one exists. Defaults are those of PromptKD's GPT-2 base run
(arXiv:2402.12842, appendix A and the authors' script) unless a field says otherwise.
"""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from promptkd.errors import UserError

FAMILIAR_NAMES = {
    "lmbda": "student_share",
    "lambda": "student_share",
    "model": "student",
    "teacher_model": "teacher",
    "train_dataset": "data.train",
    "eval_dataset": "data.validation",
    "per_device_train_batch_size": "micro_batch_tokens",
    "gradient_accumulation_steps": "global_batch_size",
    "batch_size": "global_batch_size",
    "max_new_tokens": "max_response_tokens",
    "max_prompt_length": "max_request_tokens",
    "num_train_epochs": "epochs",
    "bf16": "precision",
    "save_steps": "checkpoints.every_steps",
    "eval_steps": "evaluation.every_steps",
    "report_to": "tracking",
    "output_dir": "output",
    "lr": "learning_rate",
    "validation_loss": "cross_entropy",
}


Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: its keys are known, and its numbers are numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: Any) -> Any:
        refuse_look_alikes(value, cls.model_fields[info.field_name].annotation)
        return value


def refuse_look_alikes(value: Any, annotation: Any) -> None:
    """Refuse what would pass for something else: true as a number, a NUL in a name.

    Raises:
        ValueError: saying what is expected.
    """
    kinds = get_args(annotation) or (annotation,)
    if isinstance(value, bool) and {int, float} & set(kinds) and bool not in kinds:
        raise ValueError("a number is expected, not true or false")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("a text without NUL characters is expected")


Keys = TypeVar("Keys", bound=Section)


class LoRASection(Section):
    r: int = Field(default=16, ge=1, le=4096, description="rank of the adapters")
    alpha: int = Field(default=32, ge=1, description="the update is scaled by alpha / r")
    target_modules: tuple[str, ...] = Field(default=(), description="empty: PEFT's choice")
    merge: bool = Field(default=False, description="save whole weights instead of an adapter")


class StudentSection(Section):
    model: Name = Field(description="hub id, directory, a .gguf file, or a finished run's directory")
    lora: LoRASection | None = Field(default=None, description="train adapters, not the weights")


class TeacherSection(Section):
    model: Name = Field(description="hub id, directory, a .gguf file, or a finished run's directory")


class MethodSection(Section):
    """A name of ``promptkd.methods.METHODS`` or ``module:function``; the rest are its options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: Name = "promptkd"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(Section):
    train: tuple[Name, ...] = Field(min_length=1, description="path, glob or hub id, or a list of them")
    validation: tuple[Name, ...] = Field(default=(), description="held-out data, same formats")
    template: Name = Field(
        default="auto",
        description="auto | chat | alpaca | none | a Jinja file; auto: the tokenizer's chat "
        "template where it has one, else alpaca",
    )
    template_options: dict[str, Any] = Field(
        default={}, description="given to the chat template (enable_thinking: false)"
    )
    columns: dict[str, str] = Field(
        default={}, description="request, response, input, system, messages: the data's names"
    )
    max_request_tokens: int = Field(default=256, ge=1)
    max_response_tokens: int = Field(default=256, ge=1)

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class SamplingSection(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy decoding")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0 keeps every token")


class OptimizationSection(Section):
    learning_rate: float = Field(default=5e-5, ge=0)
    teacher_learning_rate: float = Field(default=5e-5, ge=0, description="soft prompt's or LoRA's")
    global_batch_size: int = Field(default=32, ge=1, description="requests a step, over all ranks")
    micro_batch_tokens: int | None = Field(
        default=None, ge=1, description="padded tokens per forward; not given: what fits in memory"
    )
    max_steps: int | None = Field(default=None, ge=1, le=10**9, description="optimizer steps")
    epochs: float | None = Field(
        default=None, gt=0, le=10**6, description="used when max_steps is not given"
    )
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    teacher_step: Literal["before_student", "with_student"] = "before_student"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _length_of_training(self) -> "OptimizationSection":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps is {self.max_steps} and epochs is {self.epochs}: give exactly one"
            )
        return self


class EvaluationSection(Section):
    every_steps: int = Field(default=44, ge=0, description="0 evaluates at the end only")
    metric: Literal["rouge_l", "exact_match", "reverse_kl_to_teacher", "cross_entropy"] = "rouge_l"
    num_examples: int = Field(default=200, ge=1)
    exposure_bias_every_steps: int = Field(
        default=0, ge=0, description="R(l), E(l), ExAccErr(l) on the validation data; 0: never"
    )


class CheckpointSection(Section):
    every_steps: int = Field(default=44, ge=1)
    keep: int = Field(default=2, ge=1)


class Recipe(Section):
    """Everything that defines a run."""

    student: StudentSection
    teacher: TeacherSection | None = None
    method: MethodSection = MethodSection()
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    optimization: OptimizationSection
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto: bf16 where the processor multiplies it natively"
    )
    evaluation: EvaluationSection = EvaluationSection()
    checkpoints: CheckpointSection = CheckpointSection()
    tracking: tuple[Tracker, ...] = Field(default=(), description="accelerate's trackers")
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: Name

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply ``key=value`` overrides (dotted keys, YAML values).

    Raises:
        UserError: if the file is missing or not YAML, or a key or value is wrong.
    """
    keys = read_keys(path, "Recipe")
    for override in overrides:
        _apply_override(keys, override)
    return recipe_from_dict(keys)


def recipe_from_dict(raw: dict[str, Any]) -> Recipe:
    """Validate a recipe given as nested dictionaries.

    Raises:
        UserError: for an unknown key (with the nearest known one) or a value out of range.
    """
    return validate(Recipe, raw)


def read_keys(path: str | Path, what: str) -> dict[str, Any]:
    """The keys of a YAML file, not yet validated; ``what`` it is stands in complaints.

    Raises:
        UserError: if the file is missing, not YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}. Name an existing YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not text. Name a YAML file.") from None
    raw = _read_yaml(text, f"{what} {path}")
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path} holds no keys. Write a mapping, as in docs/ and recipes/.")
    for key in cast(dict[Any, Any], raw):
        if not isinstance(key, str):
            raise UserError(f"{what} {path}: the key {key!r} is no text. Put it in quotes.")
    return cast(dict[str, Any], raw)


def validate(
    model: type[Keys], raw: dict[str, Any], what: str = "recipe", prefix: str = ""
) -> Keys:
    """Check nested dictionaries; every fault is named, with ``prefix`` before its dotted key.

    Raises:
        UserError: for an unknown key (with the nearest known one) or a value out of range.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        faults = [_explain(item, model, what, prefix) for item in error.errors()]
        raise UserError("\n".join(faults)) from None


def suggest(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or the list of known ones."""
    familiar = FAMILIAR_NAMES.get(word)
    if familiar and any(familiar.rpartition(".")[2] == name.rpartition(".")[2] for name in known):
        return f"; did you mean '{familiar}'?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; did you mean '{familiar}'?" if familiar else f"; known: {', '.join(known)}"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"Override '{override}' has no '='. Write key=value, as in seed=1.")
    parts = key.split(".")
    node: Any = raw
    for part in parts[:-1]:
        child: Any = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"Override '{override}': '{part}' is a value, not a section.")
        node = cast(Any, child)
    node[parts[-1]] = _read_yaml(value, f"Override {shown(override)}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (5e-5 is one, which YAML 1.1 reads as a text), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key '{key.value}' is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise UserError(f"{what} is nested too deeply. A recipe has two levels of keys.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number beyond all bounds
        raise UserError(f"{what} is not valid YAML: {error}") from None


def _explain(item: Any, model: Any, what: str, prefix: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = prefix + ".".join(location)
    if item["type"] == "extra_forbidden":
        for part in location[:-1]:
            annotation = model.model_fields[part].annotation
            options = getattr(annotation, "__args__", (annotation,))
            model = next(option for option in options if hasattr(option, "model_fields"))
        return f"unknown key '{key}'{suggest(location[-1], list(model.model_fields))}"
    if item["type"] == "missing":
        return f"'{key}' is missing from the {what}."
    return _fault(key, item)


def _fault(key: str, item: Any) -> str:
    reason = item["msg"].removeprefix("Value error, ").removesuffix(".")
    if isinstance(item["input"], dict) and item["type"] == "value_error":  # of several keys
        return f"'{key}': {reason}." if key else f"{reason}."
    return f"'{key}' is {shown(item['input'])}: {reason}."


def option_faults(error: ValidationError, prefix: str) -> str:
    """What is wrong with the options of a function or class, a sentence each."""
    return "\n".join(_option_fault(item, prefix) for item in error.errors())


def _option_fault(item: Any, prefix: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = prefix + ".".join(location) if location else ""
    if item["type"] in ("missing_argument", "missing"):
        return f"'{key}' is missing, and has no default."
    return _fault(key, item)


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The function that ``module:function`` names, from the current directory or Python's path.

    This runs the module's code, as any import does.

    Raises:
        UserError: if there is none, or its module can't be imported.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UserError(f"{what} '{name}' has not the form module:function.")
    if os.getcwd() not in sys.path:  # the installed command doesn't look there, python -m does
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module can raise anything
        raise UserError(
            f"{what} '{name}' cannot be imported: {error}. Write module:function, "
            "with the module in the current directory or on the Python path."
        ) from None
    if not inspect.isfunction(function):
        raise UserError(
            f"{what} '{name}' is a {type(function).__name__}, not a function. Name a Python "
            "function."
        )
    return function


def shown(value: Any) -> str:
    """A value in a sentence, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
