"""What models weigh: parameters, bytes in memory, bytes on disk."""

from pathlib import Path

import peft
from torch import nn
from transformers.utils.hub import cached_file

from promptkd.given import GivenModel
from promptkd.models.frozen import Int8Linear, NF4Linear
from promptkd.models.loading import location


def num_parameters(module: nn.Module) -> int:
    """Of the model as it came: a quantised weight counts as what it stands for."""
    counts: dict[int, int] = {}
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point():
            counts[id(layer.weight)] = layer.in_features * layer.out_features
        if isinstance(layer, Int8Linear | NF4Linear):
            counts[id(layer.scale)] = 0
    return sum(counts.get(id(p), p.numel()) for p in module.parameters())


def bytes_in_memory(module: nn.Module) -> int:
    """Of its weights and buffers as they are loaded; what two layers share counts once."""
    held = {t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())


def bytes_on_disk(name: str) -> int:
    """Of the files that hold a model's weights; a LoRA's base counts with it."""
    if isinstance(name, GivenModel):
        return bytes_in_memory(name.thing)
    arguments = location(name)
    place = Path(arguments["pretrained_model_name_or_path"])
    if "gguf_file" in arguments:
        return (place / arguments["gguf_file"]).stat().st_size
    if not place.is_dir():  # a hub id, in the cache that it was loaded from
        place = Path(str(cached_file(str(place), "config.json"))).parent
    files = [*place.glob("*.safetensors")] or [*place.glob("*.bin")]
    base = None
    if (place / "adapter_config.json").is_file():
        base = peft.PeftConfig.from_pretrained(str(place)).base_model_name_or_path
    return sum(file.stat().st_size for file in files) + (bytes_on_disk(base) if base else 0)
