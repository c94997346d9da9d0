"""PromptKD on one page: the whole algorithm, top to bottom, without the library.

    python examples/promptkd_from_scratch.py --teacher DIR --student DIR --data FILE --output DIR

Request x, response y, frozen teacher p, student q, soft prompt P (a few vectors in front of the
teacher's input; p_P is the teacher that hears them). Step k of K:

    1. y ~ q(.|x)                                           the student writes; no gradient
    2. P <- P - rate * grad [ KL(p_P||q) + (K-k)/K KL(p_P||p) ]     the teacher adapts (Eq. 1-3)
    3. q <- q - rate * grad   KL(q||p_P)                    the student learns, from the P just
                                                            learnt (Eq. 4)

Every KL runs over the whole vocabulary at every token of y, the end-of-sequence token included, and
is averaged over all response tokens of the step. Responses are taken one at a time, so there are no
pads and no masks. That is slow; the library is fast and does the same (tests/test_from_scratch.py).

Source: Kim, Jang and Yang 2024, arXiv:2402.12842, section 3 and Algorithm 1.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
CONTEXT = ", paired with an input that provides further context"


def kl(first, second):
    """KL(first || second) in nats, summed over tokens and vocabulary, from log-probabilities."""
    return (first.exp() * (first - second)).sum()


def response_logprobs(model, request, response, soft_prompt=None):
    """Log-probabilities (tokens x vocabulary) at the positions that predict the response."""
    embeddings = model.get_input_embeddings()(torch.tensor([request + response]))
    start = len(request) - 1  # the last token of the request predicts the first of the response
    if soft_prompt is not None:
        embeddings = torch.cat([soft_prompt[None], embeddings], dim=1)
        start += len(soft_prompt)
    logits = model(inputs_embeds=embeddings).logits[0, start : start + len(response)]
    return logits.log_softmax(-1)


@torch.no_grad()
def write(student, request, uniforms, stop_ids):
    """A response: each token is where the cumulative distribution passes a uniform number."""
    response, new, cache = [], request, None
    for uniform in uniforms:
        output = student(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
        logits, cache = output.logits[0, -1], output.past_key_values
        cumulative = (logits - logits.max()).exp().cumsum(0)
        token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        response.append(token)
        if token in stop_ids:
            break
        new = [token]
    return response


def initial_prompt(teacher, tokenizer, text="Suppose you are a student.", length=7):
    """The teacher's embeddings of a text, cut or repeated to ``length`` vectors."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = [ids[position % len(ids)] for position in range(length)]
    return teacher.get_input_embeddings().weight[ids].detach().clone().requires_grad_()


def positions_of_step(num_requests, step, batch_size, seed):
    """Which requests belong to a step: one shuffled pass over the data after the other."""
    positions = []
    for count in range(step * batch_size, (step + 1) * batch_size):
        order = list(range(num_requests))
        random.Random(f"data order {seed} {count // num_requests}").shuffle(order)
        positions.append(order[count % num_requests])
    return positions


def adamw(parameters, rate):
    """Weight decay for matrices (the soft prompt is one), none for biases and norms."""
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)


def update(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def distil(student, teacher, soft_prompt, requests, stop_ids, settings):
    """Train ``student`` and ``soft_prompt`` in place; yields both losses, in nats per token."""
    teacher.requires_grad_(False)
    student_optimizer = adamw(list(student.parameters()), settings.learning_rate)
    prompt_optimizer = adamw([soft_prompt], settings.prompt_learning_rate)
    for step in range(settings.steps):
        # 1. The student writes. Every response has a random state of its own.
        pairs = []
        for position in positions_of_step(len(requests), step, settings.batch_size, settings.seed):
            row, request = requests[position]
            generator = np.random.default_rng((settings.seed, step, row))
            uniforms = torch.tensor(generator.random(settings.max_response_tokens)).float()
            pairs.append((request, write(student, request, uniforms, stop_ids)))
        num_tokens = sum(len(response) for _, response in pairs)

        # 2. The teacher adapts. c_k: 1 - 1/K at first, 0 at last.
        annealed = (settings.steps - (step + 1)) / settings.steps
        prompt_loss = 0.0
        for pair in pairs:
            with torch.no_grad():
                q, p = response_logprobs(student, *pair), response_logprobs(teacher, *pair)
            adapted = response_logprobs(teacher, *pair, soft_prompt)
            loss = (kl(adapted, q) + annealed * kl(adapted, p)) / num_tokens
            loss.backward()
            prompt_loss += loss.item()
        update(prompt_optimizer)

        # 3. The student learns, on the same responses, from the teacher as it is now.
        student_loss = 0.0
        for pair in pairs:
            with torch.no_grad():
                adapted = response_logprobs(teacher, *pair, soft_prompt)
            loss = kl(response_logprobs(student, *pair), adapted) / num_tokens
            loss.backward()
            student_loss += loss.item()
        update(student_optimizer)
        yield {"step": step + 1, "prompt_loss": prompt_loss, "student_loss": student_loss}


def read_requests(path, tokenizer, max_request_tokens):
    """Row numbers and token ids of the requests; those that are too long are left out."""
    requests = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            given = row.get("input", "")
            text = ALPACA.format(
                instruction=row["instruction"],
                context=CONTEXT if given else "",
                input=f"### Input:\n{given}\n\n" if given else "",
            )
            request = tokenizer(text).input_ids
            if len(request) <= max_request_tokens:
                requests.append((number, request))
    return requests


def main(arguments=None):
    parser = argparse.ArgumentParser(description="PromptKD on one page")
    for name in ("teacher", "student", "data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=880)  # GPT-2 base: 20 epochs of Dolly
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--prompt-learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-request-tokens", type=int, default=256)
    parser.add_argument("--max-response-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(settings.student)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()  # no dropout
        for name in (settings.student, settings.teacher)
    )
    requests = read_requests(settings.data, tokenizer, settings.max_request_tokens)
    soft_prompt = initial_prompt(teacher, tokenizer)
    stop_ids = {tokenizer.eos_token_id}
    losses = []
    for record in distil(student, teacher, soft_prompt, requests, stop_ids, settings):
        print(json.dumps(record))
        losses.append(record)
    student.save_pretrained(settings.output)
    tokenizer.save_pretrained(settings.output)
    torch.save(soft_prompt.detach(), Path(settings.output) / "soft_prompt.pt")
    return losses


if __name__ == "__main__":
    main()
