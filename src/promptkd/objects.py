"""A recipe whose models and data come as objects of Python, in place of the names in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import peft

from promptkd.config import Recipe, load_recipe, recipe_from_dict
from promptkd.data import given_rows
from promptkd.errors import UserError
from promptkd.given import Given
from promptkd.keys import suggest
from promptkd.models.objects import given_model

AnyRecipe = Recipe | Mapping[str, Any] | str | Path
"""Validated, as nested dictionaries, or the path of its file."""
AS_LORA = {"r": "r", "lora_alpha": "alpha", "target_modules": "target_modules"}
"""PEFT's names of what ``student.lora`` has."""
SAYS_NOTHING = ("task_type", "inference_mode", "fan_in_fan_out", "base_model_name_or_path")
"""Fields of a ``LoraConfig`` that follow from the model."""


class Objects(TypedDict, total=False):
    """The arguments that stand in place of names in a recipe, which may then be missing there.

    Attributes:
        student: as ``student.model``: a causal language model of transformers or PEFT, or a name.
        teacher: as ``teacher.model``, likewise.
        tokenizer: of the models that are objects; not given, the one that lies where they are from.
        teacher_tokenizer: the teacher's, if it has another one.
        train: as ``data.train``: lists of dictionaries, ``datasets.Dataset``, or names.
        validation: as ``data.validation``, likewise.
        peft_config: as ``student.lora``: a ``peft.LoraConfig``; merged into a student object.
    """

    student: Any
    teacher: Any
    tokenizer: Any
    teacher_tokenizer: Any
    train: Any
    validation: Any
    peft_config: Any


def complete(recipe: AnyRecipe, objects: Objects, method: str | None = None) -> Recipe:
    """The recipe with the objects in it, under names that carry them.

    Args:
        recipe: its names of what is an object may be missing.
        objects: what stands in their place.
        method: the name of a method, with its defaults, in place of the recipe's.

    Raises:
        UserError: for a wrong recipe, objects that are no models or rows, unknown arguments.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe)
    whole = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
    changes = _names_of_objects(objects)
    if isinstance(recipe, Recipe):
        changes = _merged(_names_of(recipe), changes)
    raw = _merged(whole, changes)
    if method is not None:
        raw["method"] = {"name": method}
    is_object = isinstance(changes.get("student", {}).get("model"), Given)
    peft_config = objects.get("peft_config")
    if peft_config is not None:
        lora = lora_keys(peft_config) | ({"merge": True} if is_object else {})
        raw = _merged(raw, {"student": {"lora": lora}})
    completed = recipe_from_dict(raw)
    lora = completed.student.lora
    if is_object and lora and not lora.merge:
        raise UserError(
            "The student came as an object, and an adapter names the model that it belongs to. "
            "Set student.lora.merge, which saves whole weights, or name the student."
        )
    carried = {  # validation keeps the text of a name alone
        section: getattr(completed, section).model_copy(update=keys)
        for section, keys in changes.items()
    }
    return completed.model_copy(update=carried)


def _names_of_objects(objects: Objects) -> dict[str, dict[str, Any]]:
    """What they are called in the recipe, by section and key."""
    known = sorted(Objects.__annotations__)
    for name in objects:
        if name not in known:
            raise UserError(f"There is no argument '{name}'{suggest(name, known)}.")
    found: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}, "data": {}}
    tokenizer = objects.get("tokenizer")
    if (student := objects.get("student")) is not None:
        found["student"]["model"] = given_model(student, tokenizer, "student")
    if (teacher := objects.get("teacher")) is not None:
        own = objects.get("teacher_tokenizer") or tokenizer
        found["teacher"]["model"] = given_model(teacher, own, "teacher")
    for part in ("train", "validation"):
        if (rows := objects.get(part)) is not None:
            found["data"][part] = given_rows(rows, part)
    return {section: keys for section, keys in found.items() if keys}


def _names_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Those of a recipe that may carry objects, from another call."""
    data = recipe.data
    found: dict[str, dict[str, Any]] = {
        "student": {"model": recipe.student.model},
        "data": {"train": data.train, "validation": data.validation},
    }
    if recipe.teacher:
        found["teacher"] = {"model": recipe.teacher.model}
    return found


def _merged(whole: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sections with some of their keys changed; what is no section is left to validation."""
    found = dict(whole)
    for section, keys in changes.items():
        own = found.get(section) or {}
        if isinstance(own, Mapping):
            found[section] = {**own, **keys}
    return found


def has_objects(recipe: Recipe) -> bool:
    """Whether a model or rows came as objects."""
    names = [name for keys in _names_of(recipe).values() for name in keys.values()]
    flat = [own for name in names for own in ([name] if isinstance(name, str) else name or ())]
    return any(isinstance(own, Given) for own in flat)


def lora_keys(config: Any) -> dict[str, Any]:
    """A ``peft.LoraConfig`` as the keys of ``student.lora``.

    Raises:
        UserError: for another kind of adapter, and for settings that a recipe doesn't have.
    """
    if not isinstance(config, peft.LoraConfig):
        raise UserError(
            f"peft_config is a {type(config).__name__}. A student is trained whole or by LoRA: "
            "give a peft.LoraConfig."
        )
    own, plain = config.to_dict(), peft.LoraConfig().to_dict()
    if own["lora_dropout"]:
        raise UserError(
            f"peft_config.lora_dropout is {own['lora_dropout']}. Nothing is dropped here: the "
            "student that learns from a response is the very one that generated it, whose "
            "probabilities the losses are made of. Set it to 0."
        )
    known = {*AS_LORA, *SAYS_NOTHING}
    others = [name for name in plain if name not in known and own[name] != plain[name]]
    if others:
        raise UserError(
            f"peft_config sets {', '.join(others)}, which student.lora doesn't have. It takes "
            f"{', '.join(AS_LORA)}."
        )
    modules = own["target_modules"] or ()
    if isinstance(modules, str) and modules != "all-linear":
        raise UserError(
            f"peft_config.target_modules is {modules!r}: list the layers' names instead, or say "
            "'all-linear'."
        )
    names = modules if isinstance(modules, str) else sorted(modules)
    return {"r": own["r"], "alpha": own["lora_alpha"], "target_modules": names}
