"""Decode steps in fixed shapes, on a GPU captured once and replayed for every token.

A token step of a small model is some forty launches a layer, which take the host longer than their
work takes the card. A CUDA graph launches all of them at once, if neither shapes nor addresses
change: keys and values are written at a column that a tensor names, and attention runs over columns
up to a multiple of ``EXTENT``, of which a mask tells the written ones.

A graph lives for one call of ``generate``. Captures cost about as much as a few steps, and weights
of a working copy lie somewhere else at the next call; buffers for them that stay would hold the
copy's memory while the run learns.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from promptkd.generation.kv_cache import fixed_view, is_plain
from promptkd.kernels.attention import NAME
from promptkd.kernels.compiled import is_compiled
from promptkd.models.language_model import LanguageModel

EXTENT = 256
"""Columns by which attention grows: at most 255 are read in vain, and few graphs are captured."""
DEVICES = ("cuda",)
"""Where steps have fixed shapes; elsewhere launches are cheap and columns in vain aren't."""

Decode = Callable[
    [Int[Tensor, "rows one"], Bool[Tensor, "rows columns"], DynamicCache],
    Float[Tensor, "rows vocab"],
]
"""The last tokens, which columns are real, the cache -> scores of the next tokens."""


def fits(model: LanguageModel) -> bool:
    """Whether a model's decode step has fixed shapes and is captured: with ``kernels: compiled``.

    Its cache has to be plain, its weights on the device, and its layers must ask the device
    nothing. So transformers says of an architecture; it isn't true of flash attention, which counts
    tokens, of frequencies that follow the longest row (``dynamic``, ``longrope``), and of experts,
    whose weights have three axes.
    """
    module, weights = model.module, list(model.module.parameters())
    rotations = {str(getattr(part, "rope_type", "")) for part in module.modules()}
    return (
        model.device.type in DEVICES
        and is_compiled(module)
        and is_plain(module)
        and module._can_compile_fullgraph
        and module.config._attn_implementation in (NAME, "sdpa", "eager")
        and all(weight.device == model.device and weight.dim() < 3 for weight in weights)
        and not rotations & {"dynamic", "longrope"}
    )


class FixedSteps:
    """Decode steps of some rows, one for each extent of columns.

    Args:
        decode: computes a step; it must ask the device nothing.
        tokens: the last tokens; what stands there when a step is called is read.
        mask: true at real columns up to the one that is written, false after it.
        cache: plain, of as many columns as the mask.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        tokens: Int[Tensor, "rows one"],
        mask: Bool[Tensor, "rows capacity"],
        cache: DynamicCache,
    ):
        self._decode, self._tokens, self._mask, self._cache = decode, tokens, mask, cache
        self._column = torch.zeros(1, dtype=torch.long, device=mask.device)
        self._steps: dict[int, Callable[[], Tensor]] = {}
        self._memory: Any = None

    def __call__(self, column: int) -> Float[Tensor, "rows vocab"]:
        """Scores after the last tokens, which are written at ``column``; valid until the next."""
        self._column.fill_(column)
        extent = min(EXTENT * (column // EXTENT + 1), self._mask.shape[1])
        if extent in self._steps:
            return self._steps[extent]()
        mask, view = self._mask[:, :extent], fixed_view(self._cache, extent, self._column)

        def step() -> Tensor:
            return self._decode(self._tokens, mask, view)

        scores = step()  # libraries get ready in it, which they can't while they are captured
        self._steps[extent] = self._captured(step) if mask.is_cuda else step
        return scores

    def _captured(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """All graphs share the memory of their intermediate results; one at a time needs it."""
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the card meanwhile, as those that watch over processes do.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            scores = step()

        def replay() -> Tensor:
            graph.replay()
            return scores

        return replay
