"""Whole training steps against a derivation of their own.

The derivation below uses float64, whole logits, one sequence at a time and no padding, and is
written from the equations of PromptKD (arXiv:2402.12842, Eq. 1-4, Algorithm 1) and AdamW.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
from promptkd import api
from promptkd.composition import Method, Term
from promptkd.config import recipe_from_dict
from promptkd.data import Encoder, batch_of_step, read_examples, training_set
from promptkd.objectives import Divergence
from promptkd.rollouts import Student
from promptkd.teachers import Adaptation, SoftPrompt, SoftPromptTeacher
from promptkd.training import preflight

STEPS, DECAY, MAX_NORM = 3, 0.01, 1.0
RATES = {"adamw": (1e-2, 2e-2), "sgd": (0.5, 1.0)}  # of the student and of the soft prompt


# -- the derivation


def logprobs_of(module, tokens, start, soft_prompt=None):
    """Log-probabilities of tokens[start:], one row each, over the student's token ids."""
    embeddings = module.get_input_embeddings()(tokens)
    if soft_prompt is not None:
        embeddings = torch.cat([soft_prompt, embeddings])
        start += len(soft_prompt)
    logits = module(inputs_embeds=embeddings[None]).logits[0]
    return logits[start - 1 : -1, : tiny.ROWS].log_softmax(-1)


def expectation(weights, values):
    return (weights.exp() * values).sum(-1)


def cross_entropy(q, tokens):
    return torch.stack([-q[t, token] for t, token in enumerate(tokens)])


def kd_loss(q, p, tokens):
    return 0.5 * cross_entropy(q, tokens) + 0.5 * expectation(p, p - q)


def reverse_kl_loss(q, p, tokens):
    return expectation(q, q - p)


def reverse_kl_and_sft_loss(q, p, tokens, share=0.3):
    return (1 - share) * expectation(q, q - p) + share * cross_entropy(q, tokens)


def jsd_loss(q, p, tokens, beta=0.3):
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * expectation(p, p - m) + (1 - beta) * expectation(q, q - m)


class AdamWByHand:
    def __init__(self, parameters, rate):
        self.parameters, self.rate, self.time = parameters, rate, 0
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients):
        self.time += 1
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            m_hat, v_hat = m / (1 - 0.9**self.time), v / (1 - 0.999**self.time)
            decay = DECAY if p.dim() >= 2 else 0.0
            p.data = p * (1 - self.rate * decay) - self.rate * m_hat / (v_hat.sqrt() + 1e-8)


class SGDByHand:
    def __init__(self, parameters, rate):
        self.parameters, self.rate = parameters, rate

    def step(self, gradients):
        for p, g in zip(self.parameters, gradients, strict=True):
            decay = DECAY if p.dim() >= 2 else 0.0
            p.data = p - self.rate * (g + decay * p)


def clipped(gradients):
    norm = sum(g.square().sum() for g in gradients).sqrt()
    return [g * min(1.0, MAX_NORM / norm.item()) for g in gradients], norm.item()


def derive(student, teacher, prompt_ids, batches, loss, teacher_step, optimizer, rates):
    """Train in float64; returns the soft prompt and one dictionary of numbers per step."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    mover = optimizer(parameters, rates[0])
    soft_prompt = None
    if prompt_ids is not None:
        soft_prompt = teacher.get_input_embeddings().weight[prompt_ids].detach().clone()
        soft_prompt.requires_grad_(True)
        prompt_mover = optimizer([soft_prompt], rates[1])

    def learn_prompt(batch, count, k):
        towards_student = towards_itself = 0.0
        for tokens, start in batch:
            adapted = logprobs_of(teacher, tokens, start, soft_prompt)
            plain = logprobs_of(teacher, tokens, start).detach()
            q = logprobs_of(student, tokens, start).detach()
            towards_student = towards_student + expectation(adapted, adapted - q).sum() / count
            towards_itself = towards_itself + expectation(adapted, adapted - plain).sum() / count
        total = towards_student + (STEPS - k) / STEPS * towards_itself
        gradients, norm = clipped(torch.autograd.grad(total, [soft_prompt]))
        numbers = {"kl_teacher_student": towards_student.item(), "gradient_norm_teacher": norm}
        if k < STEPS:
            numbers["kl_teacher_plain"] = towards_itself.item()
        return gradients, numbers

    history = []
    for k, batch in enumerate(batches, 1):
        count = sum(len(tokens) - start for tokens, start in batch)
        numbers = {}
        if soft_prompt is not None:
            prompt_gradients, numbers = learn_prompt(batch, count, k)
            if teacher_step == "before_student":
                prompt_mover.step(prompt_gradients)
        total = 0.0
        for tokens, start in batch:
            q = logprobs_of(student, tokens, start)
            p = logprobs_of(teacher, tokens, start, soft_prompt).detach()
            total = total + loss(q, p, tokens[start:].tolist()).sum() / count
        gradients, norm = clipped(torch.autograd.grad(total, parameters))
        mover.step(gradients)
        if soft_prompt is not None and teacher_step == "with_student":
            prompt_mover.step(prompt_gradients)
        history.append({"loss": total.item(), "gradient_norm_student": norm} | numbers)
    return soft_prompt, history


# -- training, and the two side by side

PROMPTKD = {"name": "promptkd", "rollouts": "reference"}
JSD = {"name": "gkd", "student_share": 0, "divergence": "generalized_jsd", "beta": 0.3}
GKD_AND_SFT = {"name": "gkd", "student_share": 0, "sft_share": 0.3}
CASES = {
    "promptkd": (PROMPTKD, reverse_kl_loss, "before_student"),
    "promptkd_with_student": (PROMPTKD, reverse_kl_loss, "with_student"),
    "kd": ({"name": "kd"}, kd_loss, "before_student"),
    "gkd": ({"name": "gkd", "student_share": 0}, reverse_kl_loss, "before_student"),
    "gkd_and_sft": (GKD_AND_SFT, reverse_kl_and_sft_loss, "before_student"),
    "promptkd_and_sft": (PROMPTKD | {"sft_share": 0.3}, reverse_kl_and_sft_loss, "with_student"),
    "gkd_jsd": (JSD, jsd_loss, "before_student"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Directories with a pair whose teacher has padded rows, and data; by architecture."""
    made = {}
    for architecture in ("gpt2", "llama"):
        directory = tmp_path_factory.mktemp(architecture)
        tiny.save_pair(directory, architecture, teacher_options={"rows": 128})
        tiny.write_data(directory / "train.jsonl", 12)
        made[architecture] = directory
    return made


def train(directory, output, method, teacher_step, optimizer, micro_batch_tokens):
    optimization = {
        "optimizer": optimizer,
        "teacher_step": teacher_step,
        "learning_rate": RATES[optimizer][0],
        "teacher_learning_rate": RATES[optimizer][1],
        "weight_decay": DECAY,
        "max_grad_norm": MAX_NORM,
        "max_steps": STEPS,
        "micro_batch_tokens": micro_batch_tokens,
    }
    raw = tiny.recipe(directory, method=method, optimization=optimization, output=str(output))
    api.train(recipe_from_dict(raw))


def sequences(directory, step):
    """(tokens, where the response starts) of the rows of a step, from their text."""
    examples = read_examples([str(directory / "train.jsonl")])
    data = training_set(examples, Encoder(tiny.tokenizer(), "none", 24, 24))
    made = []
    for row in batch_of_step(data, step, 4, 0).examples:
        request = tiny.tokenizer()(examples[row.index].instruction).input_ids
        response = tiny.tokenizer()(examples[row.index].responses[0]).input_ids
        made.append((torch.tensor(request + [*response, tiny.EOS][:24]), len(request)))
    return made


def relative_error(actual, expected, start):
    """Of the movement away from ``start``, in the Euclidean norm."""
    actual, expected, start = actual.double(), expected.detach(), start.detach().double()
    return ((actual - expected).norm() / (expected - start).norm()).item()


@pytest.mark.parametrize(
    ("case", "architecture", "optimizer"),
    [
        *((case, "gpt2", "adamw") for case in CASES),
        ("promptkd", "gpt2", "sgd"),
        ("kd", "gpt2", "sgd"),
        ("promptkd", "llama", "adamw"),
        ("kd", "llama", "sgd"),
    ],
)
def test_three_training_steps_equal_the_derivation(pairs, tmp_path, case, architecture, optimizer):
    method, loss, teacher_step = CASES[case]
    prompted = case.startswith("promptkd")
    prompt_ids = tiny.tokenizer()("Suppose").input_ids if prompted else None
    by_hand = {"adamw": AdamWByHand, "sgd": SGDByHand}[optimizer]
    teacher = tiny.model(architecture, num_layers=3, rows=128, seed=2).double()
    expected = None
    for micro_batch_tokens in (50, 10_000):
        output = tmp_path / f"run-{micro_batch_tokens}"
        train(pairs[architecture], output, method, teacher_step, optimizer, micro_batch_tokens)
        if expected is None:
            student = tiny.model(architecture, seed=1).double()
            batches = [sequences(pairs[architecture], step) for step in range(STEPS)]
            expected = derive(
                student,
                teacher,
                prompt_ids,
                batches,
                loss,
                teacher_step,
                by_hand,
                RATES[optimizer],
            )
        soft_prompt, history = expected

        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        for row, numbers in zip(rows, history, strict=True):
            assert ("kl_teacher_plain" in row) == ("kl_teacher_plain" in numbers)
            for name, value in numbers.items():
                assert row[name] == pytest.approx(value, rel=1e-5), (row["step"], name)

        trained = load_file(output / "student/model.safetensors")
        before = dict(tiny.model(architecture, seed=1).named_parameters())
        for name, parameter in student.named_parameters():
            values = trained[name], parameter, before[name]
            if name.endswith("c_attn.bias"):
                # A bias of the keys changes no attention: its gradient is zero, and AdamW
                # divides what float noise leaves of it by itself.
                values = [torch.cat([v[: tiny.WIDTH], v[2 * tiny.WIDTH :]]) for v in values]
            assert relative_error(*values) < 2e-4, name
        if prompted:
            adapter = load_file(output / "teacher_adapter/adapter_model.safetensors")
            origin = teacher.get_input_embeddings().weight[prompt_ids]
            assert relative_error(adapter["prompt_embeddings"], soft_prompt, origin) < 2e-5


class TwoVoices(SoftPromptTeacher):
    """Its prompt learns; to the student, which needs no gradient of it, it speaks without."""

    def hidden_states(self, tokens):
        adapts = torch.is_grad_enabled()
        return super().hidden_states(tokens) if adapts else self.plain_hidden_states(tokens)


class Aside(SoftPrompt):
    def build(self, model, tokenizer):
        built = super().build(model, tokenizer)
        return TwoVoices(model, built.soft_prompt.detach(), trainable=True)


def control() -> Method:
    """PromptKD, but its student is taught by the plain teacher."""
    return Method("control", (Term(Student(), Divergence("reverse_kl")),), Aside(3), Adaptation())


def test_a_student_of_the_plain_teacher_is_gkds_whatever_a_prompt_learns_beside_it(
    pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(preflight, "_check_front", lambda *states: None)  # asks without gradient
    for name in ("gkd", "test_step:control", "promptkd"):
        output = tmp_path / name.partition(":")[0]
        train(pairs["llama"], output, {"name": name}, "before_student", "sgd", 50)
    gkd, beside, promptkd = (
        load_file(tmp_path / run / "student/model.safetensors")
        for run in ("gkd", "test_step", "promptkd")
    )
    adapter = load_file(tmp_path / "test_step/teacher_adapter/adapter_model.safetensors")
    start = tiny.model("llama", num_layers=3, rows=128, seed=2).get_input_embeddings().weight
    first = tiny.tokenizer()("Suppose you are a student.").input_ids[:3]

    assert (adapter["prompt_embeddings"] - start[first]).norm() > 0.1
    for weight, expected in gkd.items():
        assert torch.equal(beside[weight], expected)
    assert any(not torch.equal(promptkd[weight], gkd[weight]) for weight in gkd)
