"""Where a model comes from, as hubs name it: ids, and what its card says. No torch."""

from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, try_to_load_from_cache

from promptkd.files import read_json


def hub_id(name: str) -> str | None:
    """The name if it is a hub id; None for a place on this machine."""
    local = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    return None if local else name


def public_name(name: str) -> str:
    """A hub id, or a directory's own name without the path to it."""
    return hub_id(name) or Path(name).resolve().name


def card_of(name: str) -> dict[str, Any]:
    """The front matter of a model's card, as far as it is on this machine."""
    known = hub_id(name)
    if known:
        found = try_to_load_from_cache(known, "README.md")
        place = Path(found) if isinstance(found, str) else None
    else:
        place = _directory(name) / "README.md"
    return (metadata_load(place) or {}) if place and place.is_file() else {}


def origin(name: str) -> list[str]:
    """The hub ids that a model was made from: its own, those on its card, or its teacher's."""
    known = hub_id(name)
    if known:
        return [known]
    on_card = card_of(name).get("base_model") or []
    if on_card:
        return [on_card] if isinstance(on_card, str) else list(on_card)
    pruned = read_json(_directory(name) / "pruning.json", []) or {}
    return origin(pruned["teacher"]) if pruned.get("teacher") else []


def _directory(name: str) -> Path:
    """A finished run stands for its student."""
    student = Path(name) / "student"
    return student if student.is_dir() else Path(name)
