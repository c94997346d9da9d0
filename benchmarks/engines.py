"""Tokens per second of each engine and of plain ``generate``: 8 and 16 requests, 128 tokens each.

Plain ``generate`` has a process of its own. The vLLM row needs vLLM; its time includes
pushing the weights. Writes results/engines.*.json.
"""

import importlib.util
from functools import partial
from typing import Any

import torch
from setting import DTYPE, Setting, Side, alternate, own_process, record, setting, times_faster

from promptkd.generation.decoder import left_pad
from promptkd.generation.sampling import GenerationSettings
from promptkd.generation.transformers_engine import Engine, TransformersEngine
from promptkd.generation.vllm_engine import VLLMEngine
from promptkd.kernels.allocator import keep_freed_memory
from promptkd.models.language_model import LanguageModel


def by_engine(engine: Engine, setting: Setting) -> Side:
    def write(number: int) -> int:
        seeds = [(number, row) for row in range(len(setting.requests))]
        written = engine.generate(setting.requests, seeds, GenerationSettings(setting.num_new))
        return sum(len(response.token_ids) for response in written)

    return write


def by_generate(num_requests: int) -> dict[str, Side]:
    given = setting(num_requests)
    student: Any = given.student.to(DTYPE)
    ids, attended = left_pad(given.requests, student.device)

    @torch.no_grad()
    def write(number: int) -> int:
        torch.manual_seed(number)
        written = student.generate(
            ids,
            attention_mask=attended.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=given.num_new,
            min_new_tokens=given.num_new,
            pad_token_id=0,
        )
        return num_requests * (written.shape[1] - ids.shape[1])

    return {"generate": write}


def main() -> None:
    keep_freed_memory()  # as promptkd's commands do
    rows = {}
    for num_requests in (8, 16):
        given = setting(num_requests)
        student = LanguageModel(given.student, given.student.config.vocab_size, DTYPE)
        sides = own_process(partial(by_generate, num_requests), "generate")
        sides["transformers"] = by_engine(TransformersEngine(student, ()), given)
        if importlib.util.find_spec("vllm"):
            longest = given.num_new + max(len(request) for request in given.requests)
            sides["vllm"] = by_engine(VLLMEngine(student, (), longest), given)
        timings = alternate(sides, repeats=5)
        rows[num_requests] = {
            "seconds": {name: own.seconds for name, own in timings.items()},
            "tokens_per_second": {
                name: round(1 / own.seconds_per_token, 1) for name, own in timings.items()
            },
            "against_generate": times_faster(timings, "generate"),
        }
    record("engines", {"new_tokens": given.num_new, "requests": rows})


if __name__ == "__main__":
    main()
