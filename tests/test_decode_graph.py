"""A decode step in fixed shapes is the growing one, and asks the device nothing."""

import pytest
import torch

import tiny
from promptkd.generation import decode_graph
from promptkd.generation.decode_graph import FixedSteps, fits
from promptkd.generation.decoder import Decoder, Queue
from promptkd.generation.kv_cache import reserved_cache
from promptkd.kernels.matmul import GenerationMatmuls
from promptkd.models.language_model import LanguageModel
from test_architectures import plain

REQUESTS = [(5, 9, 30, 41, 7, 66, 12, 20), (50, 51), (22, 90, 14), (8, 9), (70,), (33, 3)]
FAMILIES = ("llama", "gpt2", "opt", "qwen3", "bloom", "falcon (ALiBi)", "gptj")


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """As on a card with ``kernels: compiled``."""
    monkeypatch.setattr(decode_graph, "is_compiled", lambda module: True)


def module_of(name):
    return tiny.model(name, seed=1) if name in tiny.ARCHITECTURES else plain(name)


def decoder(model, rows):
    return Decoder(model, GenerationMatmuls(), Queue(REQUESTS, num_rows=rows, room=24))


@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_the_scores_of_the_growing_cache(monkeypatch, name):
    """While rows are refilled and leave, over several extents, with columns that run out."""
    model, found = tiny.language_model(module_of(name)), []
    monkeypatch.setattr(decode_graph, "EXTENT", 8)
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(decode_graph, "DEVICES", devices)
        assert fits(model) == bool(devices)
        with torch.no_grad():
            writing = decoder(model, rows=4)
            scores = [writing.start()]
            for time in range(30):
                writing.read(scores[-1].argmax(-1))
                if time == 5:
                    writing.release([1, 2])
                    writing.refill([1, 2])
                if time == 20:
                    writing.release([0, 3])
                if time == 25:
                    writing.keep([1, 2])
                scores.append(writing.step().clone())
        found.append(scores)

    for time, (growing, fixed) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(
            fixed, growing, rtol=1e-5, atol=1e-4, msg=lambda text, at=time: f"{at}: {text}"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_it_asks_the_device_nothing(monkeypatch, name):
    """Tensors on the meta device have no numbers: reading one, as a host does, raises."""
    monkeypatch.setattr(decode_graph, "DEVICES", ("meta",))
    model = LanguageModel(module_of(name).to("meta"), tiny.ROWS)
    assert fits(model)
    cache = reserved_cache(model.module.config, 32)
    heads = getattr(model.module.config, "num_key_value_heads", 4)
    for layer in range(len(cache.layers)):
        cache.update(*(torch.empty(3, heads, 8, 8, device="meta") for _ in "kv"), layer)
    tokens = torch.empty(3, 1, dtype=torch.long, device="meta")
    mask = torch.empty(3, 32, dtype=torch.bool, device="meta")
    with torch.no_grad():
        decode = decoder(model, 3)._decode
        scores = FixedSteps(decode, tokens=tokens, mask=mask, cache=cache)(8)

    assert scores.shape == (3, tiny.ROWS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral (window)", "windows"),
        ("lfm2", "convolutions"),
        ("qwen3_moe", "experts"),
        ("mpt", "transformers doesn't compile it whole"),
    ],
)
def test_other_models_have_no_fixed_shapes(monkeypatch, name, why):
    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    assert not fits(tiny.language_model(plain(name)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_row_have_none(monkeypatch, kind):
    monkeypatch.setattr(decode_graph, "DEVICES", ("cpu",))
    scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        scaling |= {
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 128,
        }
    model = tiny.language_model(tiny.model("llama", rope_parameters=scaling))
    assert not fits(model)
