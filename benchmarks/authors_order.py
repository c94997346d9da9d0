"""One optimizer step of PromptKD: promptkd against the schedule of the authors' script.

    python benchmarks/authors_order.py [DATA.jsonl]

The other side works as their script does: micro-batches of two, each written by itself, padded to
512 and passed five times (adapted teacher, plain teacher, student; adapted teacher, student), whole
fp32 logits, prompt and student gradients side by side until both are updated; as with DeepSpeed,
passes are in one precision and AdamW works on an fp32 copy. Same models, same requests. Each side
has a process of its own, because promptkd sets the allocator and vLLM more. Without DATA every
response has 128 tokens, and with vLLM installed there are vLLM rows. With DATA lengths
are as they come, and times are per response token. Writes results/authors_order.*.json or
results/authors_order_real.*.json.
"""

import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from setting import (
    DTYPE,
    OurStep,
    Setting,
    Side,
    alternate,
    matmul_peak,
    own_process,
    record,
    setting,
    times_faster,
)
from transformers import DynamicCache

from promptkd.generation.decoder import left_pad

PADDED, MICRO_BATCH = 512, 2


class AuthorsStep:
    """Their order, on today's libraries."""

    def __init__(self, setting: Setting):
        self.setting = setting
        embeddings = setting.teacher.get_input_embeddings()
        ids = setting.tokenizer("Suppose you are a student.").input_ids
        start = embeddings(torch.tensor((ids * 7)[:7])).detach().clone()
        self.prompt = torch.nn.Parameter(start)
        self.prompt_optimizer = torch.optim.AdamW([self.prompt], lr=1e-3)
        self.masters = list(setting.student.parameters())
        self.student: Any = copy.deepcopy(setting.student).to(DTYPE)
        self.student_optimizer = torch.optim.AdamW(self.masters, lr=1e-5)

    def __call__(self, number: int) -> int:
        torch.manual_seed(number)
        self.num_written = 0
        requests = self.setting.requests
        num_parts = len(requests) // MICRO_BATCH
        for start in range(0, len(requests), MICRO_BATCH):
            self._micro_batch(requests[start : start + MICRO_BATCH], number, num_parts)
        pairs = list(zip(self.masters, self.student.parameters(), strict=True))
        for master, working in pairs:
            master.grad, working.grad = working.grad.float(), None
        torch.nn.utils.clip_grad_norm_([self.prompt], 1.0)
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in (self.prompt_optimizer, self.student_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for master, working in pairs:
                working.copy_(master)
        return self.num_written

    def _micro_batch(self, requests, number: int, num_parts: int) -> None:
        teacher, student = self.setting.teacher, self.student
        tokens, mask = self._write(requests)
        labels = mask[:, 1:]
        adapted = self._adapted(tokens)
        with torch.no_grad():
            plain = teacher(tokens).logits
            student_now = student(tokens).logits
        share = (1000 - number - 1) / 1000
        loss = mean_kl(adapted, student_now, labels) + share * mean_kl(adapted, plain, labels)
        (loss / num_parts).backward()
        del adapted, plain, student_now, loss
        with torch.no_grad():
            target = self._adapted(tokens)
        (mean_kl(student(tokens).logits, target, labels) / num_parts).backward()

    @torch.no_grad()
    def _write(self, requests):
        ids, attended = left_pad(requests, self.student.device)
        setting = self.setting
        written = self.student.generate(
            ids,
            attention_mask=attended.long(),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=setting.num_new,
            min_new_tokens=setting.num_new if setting.forced else None,
            eos_token_id=list(setting.stop) or None,
            pad_token_id=0,
            past_key_values=DynamicCache(config=self.student.config),
        )[:, ids.shape[1] :]
        tokens = torch.zeros(len(requests), PADDED, dtype=torch.long)
        mask = torch.zeros(len(requests), PADDED, dtype=torch.bool)
        for row, request in enumerate(requests):
            response = written[row].tolist()
            ends = [i for i, token in enumerate(response) if token in setting.stop]
            response = response[: ends[0] + 1] if ends else response
            end = len(request) + len(response)
            tokens[row, :end] = torch.tensor([*request, *response])
            mask[row, len(request) : end] = True
        self.num_written += int(mask.sum())
        return tokens, mask

    def _adapted(self, tokens):
        teacher = self.setting.teacher
        text = teacher.get_input_embeddings()(tokens)
        front = self.prompt.to(text.dtype).expand(len(tokens), -1, -1)
        return teacher(inputs_embeds=torch.cat([front, text], dim=1)).logits[:, len(self.prompt) :]


def mean_kl(learner, target, labels):
    """KL(learner || target) over the whole logits, mean over the response tokens."""
    logprobs = learner[:, :-1].float().log_softmax(-1)
    nats = (logprobs.exp() * (logprobs - target[:, :-1].float().log_softmax(-1))).sum(-1)
    return (nats * labels).sum() / labels.sum()


def theirs(given: dict[str, Any]) -> dict[str, Side]:
    return {"authors' order": AuthorsStep(setting(**given))}


def ours(given: dict[str, Any], vllm: bool) -> dict[str, Side]:
    loaded = setting(**given)
    return {
        name: OurStep(loaded, "promptkd", name.partition(",")[0], vllm=vllm)
        for name in names_of(vllm)
    }


def names_of(vllm: bool) -> list[str]:
    return [f"{mode}{', vllm' if vllm else ''}" for mode in ("before_student", "with_student")]


def main() -> None:
    data = sys.argv[1] if len(sys.argv) > 1 else None
    given: dict[str, Any] = {"data": data, "num_layers": 20 if data else 10}
    setting(**given)  # the models are written once, before anybody reads them
    sides = own_process(partial(theirs, given), "authors' order")
    engines = [False, True] if not data and importlib.util.find_spec("vllm") else [False]
    for vllm in engines:
        sides |= own_process(partial(ours, given, vllm), *names_of(vllm))
    timings = alternate(sides)
    record(
        "authors_order_real" if data else "authors_order",
        {
            "data": Path(data).name if data else "starter",
            "num_layers": given["num_layers"],
            "seconds": {name: own.seconds for name, own in timings.items()},
            "response_tokens": {name: own.tokens for name, own in timings.items()},
            "matmul_peak": matmul_peak(),
            "times_faster": times_faster(timings, "authors' order"),
        },
    )


if __name__ == "__main__":
    main()
