"""Loaded models as they were saved: wrong weights are refused, a faulty config is mended."""

import sys
from collections.abc import Iterable, Mapping

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from promptkd.errors import UserError


def check_weights(name: str, model: PreTrainedModel, found: Mapping[str, Iterable[str]]) -> None:
    """Refuse a model some of whose numbers aren't the checkpoint's, or no numbers at all.

    Args:
        found: what transformers reports of loading: missing, unexpected and mismatched keys.

    Raises:
        UserError: with how many weights are concerned, and the first of them.
    """
    other = ("vision", "visual", "image", "audio", "multi_modal", "multimodal", "mtp")
    unexpected = [
        key for key in sorted(found["unexpected_keys"]) if not any(word in key for word in other)
    ]
    missing = sorted(found["missing_keys"])
    prefixed = any(key.startswith(("_orig_mod.", "module.")) for key in unexpected)
    hint = " Its names carry a wrapper's prefix (_orig_mod. or module.): strip it."
    for what, keys in (
        ("are missing from the checkpoint, and would be random", missing),
        ("stand in the checkpoint, but the model has no place for them", unexpected),
    ):
        if keys:
            raise UserError(
                f"{name}: {len(keys)} weights of {type(model).__name__} {what} "
                f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})."
                f"{hint if prefixed else ''} Save the whole model again."
            )
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"{name}: the weight {key} holds NaN or infinite numbers. It comes from a run "
                "that diverged, or a damaged file: name an earlier checkpoint."
            )


def make_savable(name: str, model: PreTrainedModel) -> None:
    """Mend a generation config that transformers reads but refuses to save with the student."""
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        reset = {k: v for k, v in sampling.items() if getattr(config, k, None) not in (None, v)}
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError:
            ends = ("bos_token_id", "eos_token_id", "pad_token_id")
            kept = {key: getattr(config, key, None) for key in ends}
            model.generation_config = GenerationConfig(**kept)
            reset = {}
        with_ = f"do_sample: true, since it has {', '.join(reset)}" if reset else "its tokens alone"
        tqdm.write(
            f"{name}: its generation_config.json contradicts itself and couldn't be saved again; "
            f"it goes on with {with_}",
            file=sys.stderr,
        )
