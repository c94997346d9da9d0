"""Rows whose responses have ended: refilled at once, or when the longest of their group has ended.

64 requests for SmolLM2-135M-Instruct in 16 rows, one paragraph each (at most 128 tokens), so that
lengths are uneven. The groups are what ``TransformersEngine`` writes of caches that forget.
Writes results/refill.*.json.
"""

from collections import defaultdict
from functools import partial

from setting import DTYPE, Setting, Side, alternate, record, setting, times_faster

from promptkd import kernels
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import TransformersEngine
from promptkd.kernels.allocator import keep_freed_memory
from promptkd.models.language_model import LanguageModel
from promptkd.models.loading import stop_ids

ROWS = 16


def sides(given: Setting, passes: dict[str, list[int]]) -> dict[str, Side]:
    """By groups and refilled; passes of the trunk are counted, turn by turn."""
    module, tokenizer = given.teacher, given.tokenizer
    kernels.prepare(module, module.device)
    newlines = [token for text, token in tokenizer.get_vocab().items() if "\u010a" in text]
    model = LanguageModel(module, module.config.vocab_size, DTYPE)
    engine = TransformersEngine(model, (*stop_ids(tokenizer, module), *newlines))
    requests = sorted(given.requests, key=len, reverse=True)
    decoding, counted = GenerationSettings(given.num_new), []
    module.base_model.register_forward_hook(lambda *_: counted.append(1))

    def write(name: str, at_once: int, number: int) -> int:
        counted.clear()
        tokens = 0
        for start in range(0, len(requests), at_once):
            group = requests[start : start + at_once]
            seeds = [(number, start + row) for row in range(len(group))]
            budget = ROWS * (len(group[0]) + given.num_new)
            written = engine.generate(group, seeds, decoding, max_batch_tokens=budget)
            tokens += sum(len(response.token_ids) for response in written)
        passes[name].append(len(counted))
        return tokens

    ways = {"groups": ROWS, "refilled": len(requests)}
    return {name: partial(write, name, at_once) for name, at_once in ways.items()}


def main() -> None:
    keep_freed_memory()  # as promptkd's commands do
    given, passes = setting(64), defaultdict(list)
    timings = alternate(sides(given, passes))
    row = {
        "rows": ROWS,
        "new_tokens": given.num_new,
        "passes": dict(passes),
        "seconds": {name: own.seconds for name, own in timings.items()},
        "tokens": {name: own.tokens for name, own in timings.items()},
        "times_faster": times_faster(timings, "groups"),
    }
    record("refill", row)


if __name__ == "__main__":
    main()
