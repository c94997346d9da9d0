"""Tokens per second of each engine and of plain ``generate``: 8 and 16 requests, 128 tokens each.

The vLLM row needs promptkd[vllm]; its time includes pushing the weights. Writes
results/engines.json.
"""

import importlib.util
import statistics

import torch
from setting import Setting, alternate, record, setting

from promptkd.engines import Decoding, Engine, TransformersEngine, left_pad
from promptkd.models import LanguageModel
from promptkd.vllm_engine import VLLMEngine


def by_engine(engine: Engine, setting: Setting):
    def write(number: int) -> None:
        seeds = [(number, row) for row in range(len(setting.requests))]
        written = engine.write(setting.requests, seeds, Decoding(setting.num_new))
        assert all(len(response.token_ids) == setting.num_new for response in written)

    return write


def by_generate(setting: Setting):
    ids, attended = left_pad(setting.requests, setting.student.device)

    @torch.no_grad()
    def write(number: int) -> None:
        torch.manual_seed(number)
        setting.student.generate(
            ids,
            attention_mask=attended.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=setting.num_new,
            min_new_tokens=setting.num_new,
            pad_token_id=0,
        )

    return write


def main() -> None:
    rows = {}
    for num_requests in (8, 16):
        given = setting(num_requests)
        student = LanguageModel(given.student, given.student.config.vocab_size)
        sides = {
            "generate": by_generate(given),
            "transformers": by_engine(TransformersEngine(student, ()), given),
        }
        if importlib.util.find_spec("vllm"):
            longest = given.num_new + max(len(request) for request in given.requests)
            sides["vllm"] = by_engine(VLLMEngine(student, (), longest), given)
        seconds = alternate(sides, repeats=4)
        tokens = num_requests * given.num_new
        rates = {name: tokens / statistics.median(own[1:]) for name, own in seconds.items()}
        rows[num_requests] = {
            "seconds": seconds,
            "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
            "against_generate": {n: round(r / rates["generate"], 2) for n, r in rates.items()},
        }
    record("engines", {"new_tokens": given.num_new, "requests": rows})


if __name__ == "__main__":
    main()
