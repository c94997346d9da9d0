"""Reading what users write: strict YAML, checked values, names with suggestions. No torch."""

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

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

Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: its keys are known, and its numbers are numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: Any) -> Any:
        refuse_look_alikes(value, cls.model_fields[info.field_name].annotation)
        return value


Keys = TypeVar("Keys", bound=Section)


def read_keys(path: str | Path, what: str) -> dict[str, Any]:
    """The keys of a YAML file, not yet validated; ``what`` it is stands in complaints.

    Raises:
        UserError: if the file is missing, not YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        inside = (Path(path) / name for name in ("recipe.yaml", "study.yaml"))
        other = next(filter(Path.is_file, inside), "an existing YAML file")
        raise UserError(f"{what} {path}: {error.strerror}. Name {other}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not text. Name a YAML file.") from None
    raw = read_yaml(text, f"{what} {path}")
    if not isinstance(raw, dict):
        raise UserError(f"{what} {path} holds no keys. Write a mapping, as in docs/ and recipes/.")
    for key in cast(dict[Any, Any], raw):
        if not isinstance(key, str):
            raise UserError(f"{what} {path}: the key {key!r} is no text. Put it in quotes.")
    return cast(dict[str, Any], raw)


KINDS = {
    "student": "a recipe, for promptkd train",
    "base": "a study, for promptkd study",
    "command": "a stage of a whole path, which promptkd distill runs",
}
"""What a file is, by a key that no other kind of file has."""


def refuse_another_kind(raw: dict[str, Any], path: str | Path, own: str) -> None:
    """Refuse a file of another kind in one sentence instead of one for each of its keys.

    Raises:
        UserError: saying what it is.
    """
    found = next((key for key in KINDS if key in raw), own)
    if own not in raw and found != own:
        raise UserError(f"{path} is {KINDS[found]}.")


def override(keys: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """The keys with every ``key=value`` applied, in order.

    Raises:
        UserError: for one without ``=``, or a key below a value.
    """
    for given in overrides:
        _apply_override(keys, given)
    return keys


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
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("it holds half of a character (a lone surrogate)")


def suggest(word: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known word, or the list of known ones."""
    familiar = FAMILIAR_NAMES.get(word)
    if familiar and any(familiar.rpartition(".")[2] == name.rpartition(".")[2] for name in known):
        return f"; did you mean '{familiar}'?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; did you mean '{familiar}'?" if familiar else f"; known: {', '.join(known)}"


def function_named(name: str, what: str, purpose: str) -> Callable[..., Any]:
    """What ``module:function`` names, from the current directory or the Python path.

    This runs the module's code, as any import does.

    Args:
        what: it is, for complaints: "method", "metric".
        purpose: what the function is for: "that returns a promptkd Method".

    Raises:
        UserError: if it can't be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UserError(f"{what} '{name}' has not the form module:function.")
    if os.getcwd() not in sys.path:  # the installed command doesn't look there, python -m does
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module can raise anything
        raise UserError(
            f"{what} '{name}' cannot be imported: {error}. Write module:function, "
            "with the module in the current directory or on the Python path."
        ) from None
    if not inspect.isfunction(function):
        raise UserError(
            f"{what} '{name}' is a {type(function).__name__}, not a function. Name a Python "
            f"function {purpose}."
        )
    return function


def option_faults(error: ValidationError, prefix: str) -> str:
    """What is wrong with the options of a function or class, a sentence each."""
    return "\n".join(_option_fault(item, prefix) for item in error.errors())


def shown(value: Any) -> str:
    """A value in a sentence, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise UserError(f"{what} is nested too deeply. A recipe has two levels of keys.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number beyond all bounds
        raise UserError(f"{what} is not valid YAML: {error}") from None


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
    node[parts[-1]] = read_yaml(value, f"Override {shown(override)}")


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


def _option_fault(item: Any, prefix: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = prefix + ".".join(location) if location else ""
    if item["type"] in ("missing_argument", "missing"):
        return f"'{key}' is missing, and has no default."
    return _fault(key, item)


def _fault(key: str, item: Any) -> str:
    reason = item["msg"].removeprefix("Value error, ").removesuffix(".")
    if isinstance(item["input"], dict) and item["type"] == "value_error":  # of several keys
        return f"'{key}': {reason}." if key else f"{reason}."
    end = "" if reason.endswith("?") else "."
    return f"'{key}' is {shown(item['input'])}: {reason}{end}"


RESERVED_OPTIONS = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
    *("messages", "padding", "return_dict", "return_tensors", "strftime_now", "tokenize"),
    *("tokenizer_kwargs", "tools", "truncation"),
}
"""Arguments of ``apply_chat_template`` that are not a template's own options."""


def refuse_reserved(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a template, if none of them is promptkd's own to set.

    Raises:
        ValueError: naming those that are.
    """
    taken = sorted(RESERVED_OPTIONS & options.keys())
    if taken:
        raise ValueError(f"{', '.join(taken)} can't be set here: promptkd sets it itself")
    return options
