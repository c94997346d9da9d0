"""What transformers and PEFT pass over in silence, or say in words that help nobody."""

import json
from pathlib import Path
from typing import Any

import peft

from promptkd.errors import UserError


def refuse_damaged_generation_config(directory: Path) -> None:
    """A broken generation_config.json would be left out, and with it what ends a response.

    Raises:
        UserError: if there is one and it holds no JSON object.
    """
    path = directory / "generation_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. Mend it, or remove it.")


def refuse_other_base(name: str, base: str, whole: peft.PeftModel, directory: Path) -> None:
    """A LoRA made for another model would change only the layers that both models have.

    Raises:
        UserError: if its file holds other weights than its base has places for.
    """
    kept, needed = (
        {key for key in keys if "lora_" in key}
        for keys in (
            peft.load_peft_weights(str(directory), device="cpu"),
            peft.get_peft_model_state_dict(whole, save_embedding_layers=False),
        )
    )
    if other := sorted(kept ^ needed):
        raise UserError(
            f"{name} wasn't made for its base {base}: {len(other)} weights are in one of the two "
            f"alone ({other[0]}). Write the right one into base_model_name_or_path of its "
            "adapter_config.json."
        )


def reason_of(error: Exception) -> str:
    """The first sentence of what another library says, which may go on for a page."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = said[0] if said else type(error).__name__
    if "ignore_mismatched_sizes" in reason:  # the table that it points at isn't shown
        return "its weights have other shapes than its config.json says"
    if reason.endswith(":"):
        reason = " ".join(said[:2])
    if isinstance(error, KeyError | AttributeError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return reason


def is_token_id(value: Any, rows: int) -> bool:
    """Whether a model with so many embedding rows has such a token."""
    return type(value) is int and 0 <= value < rows
