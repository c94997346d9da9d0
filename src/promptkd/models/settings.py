"""What a model's directory says beside its weights: how they are used, how tokens are spelled."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

NAMES = {"_name_or_path", "architectures", "dtype", "transformers_version"}
"""Keys of a configuration that change nothing of what it says."""


def settings(config: Any) -> dict[str, Any]:
    """All that a configuration says, as JSON keeps it."""
    return _plain(config.to_dict())


def chosen(config: Any) -> dict[str, Any]:
    """What a configuration says that isn't the default of transformers."""
    return _plain(config.to_diff_dict())


def generation_settings(module: PreTrainedModel) -> dict[str, Any]:
    """What is saved with the model on how to write with it."""
    return settings(module.generation_config) if module.generation_config else {}


def _plain(own: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in own.items() if key not in NAMES}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def spelling(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer shows in texts: ids become them by its tokens, with these options.

    How texts become ids shows in the ids themselves.
    """
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
        "special_tokens": sorted(map(str, tokenizer.all_special_tokens)),
        "chat_template": tokenizer.chat_template,
        "clean_up_tokenization_spaces": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "decoder": json.loads(backend.to_str())["decoder"] if backend else None,
    }
