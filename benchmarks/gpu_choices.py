"""Sections of gpu.py that decide how the library should compute on a card: one way against others.

What isn't the default is worth choosing where it is as much faster as said at its section.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from gpu_setting import BF16, DEVICE, QWEN, SMALLEST, TINY, language_model, seconds_of
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from promptkd.divergences import reverse_kl
from promptkd.generation import decode_graph
from promptkd.generation.decoder import Decoder, Queue
from promptkd.kernels import compiled
from promptkd.kernels.attention import _side_by_side, grouped_sdpa
from promptkd.kernels.matmul import SLICE, GenerationMatmuls, add_outer
from promptkd.models.language_model import Head
from promptkd.objectives import States, accumulate

ON_CARD = DEVICE.type == "cuda"
if not ON_CARD:  # a rehearsal only traces: compiling for a CPU takes minutes
    compiled.BACKEND = "aot_eager"


def milliseconds(ways: dict[str, Callable[[], object]]) -> dict[str, Any]:
    return {"ms": {name: 1e3 * seconds_of(work) for name, work in ways.items()}}


def head_gradient() -> dict[str, Any]:
    """The output layer's weight gradient of 421, 1,685 and 4,096 tokens of 1.5B, summed in fp32.

    As the library does it, on a card in one product; in slices, as on a processor; as one product
    in bf16, added after. The chunk of ``TILINGS`` is right where twice its tokens take nearly twice
    as long.
    """
    vocabulary, width = (SMALLEST if TINY else QWEN["1.5B"])[:2]
    into, ways = torch.zeros(vocabulary, width, device=DEVICE), {}
    for tokens in (32,) if TINY else (421, 1685, 4096):
        gradient = torch.randn(tokens, vocabulary, device=DEVICE, dtype=BF16)
        states = torch.randn(tokens, width, device=DEVICE, dtype=BF16)

        def in_slices(gradient: torch.Tensor = gradient, states: torch.Tensor = states) -> None:
            for rows, part in zip(into.split(SLICE), gradient.T.split(SLICE), strict=True):
                rows += part @ states

        def at_once(gradient: torch.Tensor = gradient, states: torch.Tensor = states) -> None:
            into.add_(gradient.T @ states)

        own = partial(add_outer, into, gradient, states)
        ways |= {
            f"{tokens}, ours": own,
            f"{tokens}, in slices": in_slices,
            f"{tokens}, in bf16": at_once,
        }
    return milliseconds(ways)


def packed_attention() -> dict[str, Any]:
    """A layer's attention over packed sequences, forward and backward.

    By one mask over all of them, as transformers' own does; as ``grouped_sdpa`` does where it can't
    use ``varlen_attn``, side by side and padded; and as it does where it can, as they lie.
    """
    shapes = [(2, 16, 4, 2, 16)] if TINY else [(16, 1024, 28, 4, 128), (64, 192, 9, 3, 64)]
    ways: dict[str, Callable[[], object]] = {}
    for number, length, heads, shared, width in shapes:
        given = [
            torch.randn(1, n, number * length, width, device=DEVICE, dtype=BF16).requires_grad_()
            for n in (heads, shared, shared)
        ]
        layer = SimpleNamespace(
            is_causal=True, num_key_value_groups=heads // shared, training=False
        )
        place = torch.arange(number * length, device=DEVICE)
        same = place[:, None] // length == place // length
        mask = (same & (place[:, None] >= place))[None, None]
        lengths = torch.full((1, 1, 1, number), length)
        by_mask = partial(sdpa_attention_forward, layer, *given, mask)  # pyright: ignore
        own = partial(grouped_sdpa, layer, *given, lengths)  # pyright: ignore
        padded = partial(_side_by_side, layer, given, number * [length], {})  # pyright: ignore
        kinds: dict[str, Callable[[], Any]] = {
            "one mask": lambda by_mask=by_mask: by_mask()[0],
            "side by side": padded,
            "ours": lambda own=own: own()[0],
        }
        for kind, attend in kinds.items():
            ways[f"{number} x {length}, {kind}"] = lambda attend=attend: (
                attend().float().sum().backward()
            )
    return milliseconds(ways)


@torch.no_grad()
def as_a_graph() -> dict[str, Any]:
    """A token of 64 rows that have read 64, launched kernel by kernel and as the library's graph.

    The difference is what ``generation.decode_graph`` saves; a rehearsal has fixed shapes alone.
    """
    rows, room, ways = 2 if TINY else 64, 32, {}
    decode_graph.DEVICES = (DEVICE.type,)
    for name in ("10 layers", "1.5B"):
        for way, fixed in (("eager", False), ("graph", True)):
            model = language_model(name, compiled=fixed)
            queue = Queue(rows * [tuple(range(5, 69))], num_rows=rows, room=room)
            decoder = Decoder(model, GenerationMatmuls(), queue)
            decoder.read(decoder.start().argmax(-1))
            ways[f"{name}, {way}"] = 1e3 * seconds_of(decoder.step, repeats=room - 1)
    return {"ms": ways}


def compiled_losses() -> dict[str, Any]:
    """Both of PromptKD's KLs over 200 tokens, from states to gradients, plain and compiled.

    ``kernels: compiled`` against plain, as a step calls them; products are the same in both. What
    the card needs to read and write the logits twice (once forth, once back) stands beside it.
    """
    vocabulary, width = (SMALLEST if TINY else QWEN["1.5B"])[:2]
    tokens = 8 if TINY else 200
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=BF16) * 0.02
    head = Head(nn.Parameter(weight, requires_grad=False), None, vocabulary, dtype=BF16)
    given = [torch.randn(tokens, width, device=DEVICE, dtype=BF16) for _ in "qp"]

    def both(logprobs: Any, tile: Any) -> dict[str, torch.Tensor]:
        q, p = logprobs["student"], logprobs["teacher"]
        return {"student": reverse_kl(q, p.detach()), "adapt": reverse_kl(p, q.detach())}

    def run(fused: bool) -> None:
        own, other = (States(hidden.requires_grad_(), head, True) for hidden in given)
        states, weights = {"student": own, "teacher": other}, {"student": 1.0, "adapt": 1.0}
        accumulate(states, both, weights, compiled=fused)

    found = milliseconds({"plain": partial(run, False), "compiled": partial(run, True)})
    return found | {"MB read and written twice": 8 * tokens * vocabulary * BF16.itemsize / 1e6}


def compiled_trunk() -> dict[str, Any]:
    """A prompted pass of the 7B, forth and back, with ``kernels: compiled`` and plain.

    The default where it saves 15 %.
    """
    ways: dict[str, Callable[[], object]] = {}
    for kind in ("plain", "compiled"):
        model = language_model("7B", compiled=kind == "compiled")
        tokens = torch.randint(5, 600, (4, 16 if TINY else 512), device=DEVICE)
        prompt = nn.Parameter(torch.randn(7, model.module.config.hidden_size, device=DEVICE) * 0.02)

        def read(model: Any = model, tokens: Any = tokens, prompt: Any = prompt) -> None:
            model.hidden_states(tokens, prompt).float().sum().backward()

        ways[kind] = read
    return milliseconds(ways)


CHOICES = (head_gradient, packed_attention, as_a_graph, compiled_losses, compiled_trunk)
