"""Rows whose responses have ended: refilled at once, or when the longest of their group has ended.

64 requests for SmolLM2-135M-Instruct in 16 rows, one paragraph each (at most 128 tokens), so that
lengths are uneven. The groups are what ``TransformersEngine`` writes of caches that forget.
Writes results/refill.*.json.
"""

from typing import Any

from setting import DTYPE, Setting, Side, alternate, record, setting, times_faster

from promptkd import kernels
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.kernels.allocator import keep_freed_memory
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import stop_ids

ROWS = 16


def sides(given: Setting) -> tuple[dict[str, Side], list[int]]:
    """By groups and refilled; each pass of the trunk is counted in the list."""
    module, tokenizer = given.teacher, given.tokenizer
    kernels.prepare(module, module.device)
    newlines = [token for text, token in tokenizer.get_vocab().items() if "\u010a" in text]
    model = LanguageModel(module, module.config.vocab_size, DTYPE)
    engine = TransformersEngine(model, (*stop_ids(tokenizer, module), *newlines))
    requests = sorted(given.requests, key=len, reverse=True)
    decoding, passes = GenerationSettings(given.num_new), [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    module.base_model.register_forward_hook(count)

    def write(number: int, at_once: int) -> int:
        tokens = 0
        for start in range(0, len(requests), at_once):
            group = requests[start : start + at_once]
            seeds = [(number, start + row) for row in range(len(group))]
            budget = ROWS * (len(group[0]) + given.num_new)
            written = engine.generate(group, seeds, decoding, max_batch_tokens=budget)
            tokens += sum(len(response.token_ids) for response in written)
        return tokens

    ways = {"groups": lambda number: write(number, ROWS)}
    ways["refilled"] = lambda number: write(number, len(requests))
    return ways, passes


def main() -> None:
    keep_freed_memory()  # as promptkd's commands do
    given = setting(64)
    ways, passes = sides(given)
    counted = {}
    for name, way in ways.items():
        before = passes[0]
        way(0)
        counted[name] = passes[0] - before
    timings = alternate(ways)
    row = {
        "rows": ROWS,
        "new_tokens": given.num_new,
        "passes": counted,
        "seconds": {name: own.seconds for name, own in timings.items()},
        "tokens": {name: own.tokens for name, own in timings.items()},
        "times_faster": times_faster(timings, "groups"),
    }
    record("refill", row)


if __name__ == "__main__":
    main()
