"""A teacher that knows more: its own request in every computation, against a derivation.

The derivation uses float64, whole logits, one sequence at a time and no padding. The teacher reads
a request of another length before the same response.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import tiny
from promptkd import api
from promptkd.adapters import LoRA
from promptkd.config import recipe_from_dict
from promptkd.data import (
    Encoder,
    batch_of_step,
    evaluation_set,
    read_examples,
    training_set,
)
from promptkd.data.briefing import DEFAULT_TEMPLATE
from promptkd.data.encoding import EncodedExample
from promptkd.data.sets import Dataset
from promptkd.divergences import kl
from promptkd.errors import UserError
from promptkd.evaluation.evaluate import evaluate, evaluate_with
from promptkd.evaluation.exposure_bias import exposure_bias
from promptkd.evaluation.prompt_analysis import prompt_analysis
from promptkd.evaluation.side_by_side import generate
from promptkd.replay import from_json, to_json
from promptkd.rollouts import Rollout
from promptkd.token_losses import distances

STEPS, BATCH = 3, 4
RATES = {"student": 0.3, "teacher": 0.5}
TEMPLATE = "{{ context }} ~ {{ request }}"
SLIDING = {"sliding_window": 40}  # shorter than the teacher's rows, so they are padded


# -- data and runs


def write_rows(path, num_rows=12):
    rows = [
        {
            "instruction": f"say {i}" + "?" * (i % 5),
            "hint": f"hint {i} " * (i % 3 + 1),
            "output": f"it is {i}!" * (i % 2 + 1),
        }
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module", params=["llama", "mistral"])
def pair(request, tmp_path_factory):
    """(architecture, directory): llama's rows are packed, this mistral's are padded."""
    directory = tmp_path_factory.mktemp(request.param)
    options = SLIDING if request.param == "mistral" else {}
    tiny.save_pair(directory, request.param, student_options=options, teacher_options=options)
    write_rows(directory / "train.jsonl")
    return request.param, directory


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llamas")
    tiny.save_pair(directory, chat_template=True)
    write_rows(directory / "train.jsonl")
    return directory


def recipe(directory, output, method, teacher=None, **overrides):
    raw = tiny.recipe(directory, method=method, output=str(output), **overrides)
    raw["optimization"] |= {
        "optimizer": "sgd",
        "learning_rate": RATES["student"],
        "teacher_learning_rate": RATES["teacher"],
        "weight_decay": 0.0,
        "max_grad_norm": 1e6,
        "max_steps": STEPS,
        **overrides.get("optimization", {}),
    }
    raw["teacher"] |= {"context": "hint", "context_template": TEMPLATE} if teacher is None else {}
    raw["teacher"] |= teacher or {}
    return recipe_from_dict(raw)


def metrics(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


# -- the derivation


def sequences(rows, step):
    """(student's tokens, where the response starts, teacher's tokens, where it starts there)."""
    read = tiny.tokenizer()
    placeholders = Dataset(tuple(EncodedExample(i, (i,), None, ()) for i in range(len(rows))))
    made = []
    for example in batch_of_step(placeholders, step, BATCH, 0).examples:
        row = rows[example.index]
        response = [*read(row["output"]).input_ids, tiny.EOS][:24]
        own = read(row["instruction"]).input_ids
        told = read(f"{row['hint']} ~ {row['instruction']}").input_ids
        assert len(own) != len(told)
        made.append(
            (torch.tensor(own + response), len(own), torch.tensor(told + response), len(told))
        )
    return made


def logprobs_of(module, tokens, start, soft_prompt=None, weights=None):
    embeddings = module.get_input_embeddings()(tokens)
    if soft_prompt is not None:
        embeddings, start = torch.cat([soft_prompt, embeddings]), start + len(soft_prompt)
    inputs = {"inputs_embeds": embeddings[None]}
    made = functional_call(module, weights or {}, (), inputs)
    return made.logits[0, start - 1 : -1, : tiny.ROWS].log_softmax(-1)


class SoftPromptByHand:
    def __init__(self, teacher):
        ids = tiny.tokenizer()("Suppose").input_ids
        start = teacher.get_input_embeddings().weight[ids].detach().clone()
        self.parameters = [start.requires_grad_(True)]

    def logprobs(self, teacher, tokens, start):
        return logprobs_of(teacher, tokens, start, soft_prompt=self.parameters[0])


class LoRAByHand:
    """W + alpha / r B A, from the same A."""

    def __init__(self, teacher):
        drawn = tiny.model(teacher.config.model_type, num_layers=3, seed=2, **SLIDING)
        LoRA().build(tiny.language_model(drawn.requires_grad_(False)), tiny.tokenizer())
        self.names, self.parameters = [], []
        for name, value in drawn.named_parameters():
            if "lora_" in name:
                self.names.append(name)
                self.parameters.append(value.detach().double().requires_grad_(True))

    def logprobs(self, teacher, tokens, start):
        factors = dict(zip(self.names, self.parameters, strict=True))
        weights = {}
        for name, a in factors.items():
            if ".lora_A." in name:
                layer = name.partition(".lora_A.")[0]
                b = factors[name.replace("lora_A", "lora_B")]
                weights[f"{layer}.weight"] = teacher.get_submodule(layer).weight + 32 / 4 * b @ a
        return logprobs_of(teacher, tokens, start, weights=weights)


def gradient_step(loss, parameters, rate):
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data = parameter - rate * gradient


def derive(student, teacher, adapted, rows):
    """Three steps of PromptKD (Eq. 1-4) whose plain and adapted teacher read the context."""
    history = []
    for k in range(1, STEPS + 1):
        batch = sequences(rows, k - 1)
        count = sum(len(tokens) - start for tokens, start, _, _ in batch)
        to_student = to_itself = 0.0
        for tokens, start, told, begin in batch:
            p_adapted = adapted.logprobs(teacher, told, begin)
            p = logprobs_of(teacher, told, begin).detach()
            q = logprobs_of(student, tokens, start).detach()
            to_student = to_student + kl(p_adapted, q).sum() / count
            to_itself = to_itself + kl(p_adapted, p).sum() / count
        coefficient = (STEPS - k) / STEPS
        gradient_step(to_student + coefficient * to_itself, adapted.parameters, RATES["teacher"])
        loss = 0.0
        for tokens, start, told, begin in batch:
            p_adapted = adapted.logprobs(teacher, told, begin).detach()
            loss = loss + kl(logprobs_of(student, tokens, start), p_adapted).sum() / count
        gradient_step(loss, list(student.parameters()), RATES["student"])
        numbers = {"loss": loss.item(), "kl_teacher_student": to_student.item()}
        if coefficient:
            numbers["kl_teacher_plain"] = to_itself.item()
        history.append(numbers)
    return history


def relative_error(actual, expected, start):
    actual, expected, start = actual.double(), expected.detach(), start.detach().double()
    return ((actual - expected).norm() / (expected - start).norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("kind", ["soft_prompt", "lora"])
def test_three_steps_with_a_context_column_equal_the_derivation(pair, tmp_path, kind):
    architecture, directory = pair
    options = SLIDING if architecture == "mistral" else {}
    rows = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    teacher = tiny.model(architecture, num_layers=3, seed=2, **options).double()
    student = tiny.model(architecture, seed=1, **options).double()
    adapted = {"soft_prompt": SoftPromptByHand, "lora": LoRAByHand}[kind](teacher)
    before = [value.detach().clone() for value in adapted.parameters]
    expected = derive(student, teacher, adapted, rows)
    method = {"name": "promptkd", "rollouts": "reference", "teacher": kind}
    for micro_batch_tokens in (160, 10_000):
        output = tmp_path / f"run-{micro_batch_tokens}"
        room = {"micro_batch_tokens": micro_batch_tokens}
        api.train(recipe(directory, output, method, optimization=room))
        for row, numbers in zip(metrics(output), expected, strict=True):
            for name, value in numbers.items():
                assert row[name] == pytest.approx(value, rel=1e-4), (row["step"], name)
        trained = load_file(output / "student/model.safetensors")
        start = dict(tiny.model(architecture, seed=1, **options).named_parameters())
        for name, parameter in student.named_parameters():
            assert relative_error(trained[name], parameter, start[name]) < 1e-3, name
        saved = load_file(output / "teacher_adapter/adapter_model.safetensors")
        if kind == "soft_prompt":
            assert (
                relative_error(saved["prompt_embeddings"], adapted.parameters[0], before[0]) < 1e-4
            )
        else:
            for name, value, first in zip(adapted.names, adapted.parameters, before, strict=True):
                key = f"base_model.model.{name.replace('.default', '')}"
                assert relative_error(saved[key], value, first) < 1e-3, name


# -- what equals what


def test_a_context_that_adds_nothing_changes_no_bit(llamas, tmp_path):
    method = {"name": "promptkd"}
    plain, told = tmp_path / "plain", tmp_path / "told"
    unread = {"columns": {"ignore": ["hint"]}}
    asked = {"context_template": "{{ request }}"}
    api.train(recipe(llamas, plain, method, teacher={"system": None}, data=unread))
    api.train(recipe(llamas, told, method, teacher=asked, data=unread))
    first, second = (
        [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "peak"))}
            for row in metrics(output)
        ]
        for output in (plain, told)
    )
    assert first == second
    same = [load_file(output / "student/model.safetensors") for output in (plain, told)]
    assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())


def test_a_distance_to_a_teacher_is_taken_after_its_own_request():
    """KL(q(.|x) || p(.|c, x)), batched with a row that has no request of the teacher's own."""
    student = tiny.language_model(tiny.model("llama", seed=1).requires_grad_(False))
    teacher = tiny.language_model(tiny.model("llama", seed=2, num_layers=3).requires_grad_(False))
    rollouts = [
        Rollout(0, (5, 6, 7), (8, 9, 0), "student", teacher_request_ids=(40, 41, 42, 43, 5, 6, 7)),
        Rollout(1, (5, 6), (8, 0), "student"),
    ]
    found = distances(rollouts, student, teacher, 1000)
    for rollout, nats in zip(rollouts, found, strict=True):
        own, told = rollout.request_ids, rollout.for_teacher.request_ids
        q = logprobs_of(student.module, torch.tensor(own + rollout.response_ids), len(own))
        p = logprobs_of(teacher.module, torch.tensor(told + rollout.response_ids), len(told))
        torch.testing.assert_close(nats.float(), kl(q, p), rtol=1e-4, atol=1e-5)


def test_the_context_decides_what_the_teacher_writes_and_what_is_kept(
    llamas, tmp_path, monkeypatch
):
    """Seqkd's responses lie in a cache: another context is another key."""
    monkeypatch.setenv("PROMPTKD_CACHE", str(tmp_path / "cache"))
    losses = {}
    for name, template in (("a", "{{ request }}"), ("b", TEMPLATE), ("a again", "{{ request }}")):
        output = tmp_path / name
        asked = {"context": "hint", "context_template": template}
        api.train(recipe(llamas, output, {"name": "seqkd"}, teacher=asked))
        losses[name] = [row["loss"] for row in metrics(output)]
    assert losses["a"] == losses["a again"] != losses["b"]


def test_a_run_with_a_context_goes_through_every_measurement(llamas, tmp_path):
    output, rows = tmp_path / "run", llamas / "train.jsonl"
    raw = recipe(
        llamas,
        output,
        {"name": "promptkd"},
        data={"validation": str(rows)},
        evaluation={"metric": "reverse_kl_to_teacher", "exposure_bias_every_steps": 3},
    )
    api.train(raw)
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scores = next(row["evaluation"] for row in logged if "evaluation" in row)
    assert scores["reverse_kl_to_teacher"] != scores["reverse_kl_without_context"]
    sample = json.loads((output / "samples.jsonl").read_text().splitlines()[0])
    assert (sample["request"], sample["teacher_request"]) == ("say 0", "hint 0  ~ say 0")
    assert exposure_bias(output, num_examples=4, seeds=(1,))["teacher_gap"]
    analysis = prompt_analysis(output, num_examples=4)
    drift = [row["kl_prompted_plain"]["mean"] for row in analysis["drift"]]
    assert all(0 < nats < 20 for nats in drift)
    told, alone = (generate(output, "say 1", context=c, temperature=0) for c in ("hint " * 9, ""))
    assert told["student"] == alone["student"]
    assert told["teacher"] != alone["teacher"]


def test_a_teacher_is_scored_as_it_taught(llamas, tmp_path):
    """Its responses and its reference's cross-entropy are those to the request with its context."""
    output, rows = tmp_path / "run", llamas / "train.jsonl"
    api.train(recipe(llamas, output, {"name": "gkd"}))
    asked = {"seeds": (1,), "num_examples": 4, "temperature": 0}
    found = evaluate_with(output, ["teacher"], str(rows), **asked)["teacher"]["train"]
    told = json.loads(
        (output / "evaluation/teacher/train.predictions.jsonl").read_text().splitlines()[0]
    )
    assert (told["request"], told["teacher_request"]) == ("say 0", "hint 0  ~ say 0")
    assert (
        told["response"] == generate(output, "say 0", context="hint 0 ", temperature=0)["teacher"]
    )
    teacher = evaluate(str(llamas / "teacher"), str(rows), like=output, output=tmp_path / "plain")
    assert teacher["scores"]["cross_entropy"] != found["scores"]["cross_entropy"]
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"instruction": "say 1", "output": "it is 1!"}) + "\n")
    with pytest.raises(UserError, match="bare has no 'hint', which the teacher reads"):
        evaluate_with(output, ["teacher"], str(bare), **asked)


def test_a_system_message_reaches_the_teacher_alone(llamas, tmp_path):
    (tmp_path / "guide.txt").write_text("Be brief.\n")
    teacher = {"system": str(tmp_path / "guide.txt"), "context": "hint"}
    found = api.check(
        recipe(llamas, tmp_path / "run", {"name": "gkd"}, teacher, data={"template": "chat"})
    )["example"]
    hint = DEFAULT_TEMPLATE.split("{% if context %}")[1].split("{{ context }}")[0] + "hint 0 "
    assert found["request"] == "user: say 0\nassistant: "
    assert found["teacher_request"] == f"system: Be brief.\nuser: say 0{hint}\nassistant: "


def test_a_run_whose_context_has_changed_does_not_go_on(llamas, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "run"
    text = (llamas / "train.jsonl").read_text()
    rows.write_text(text)
    method, data = {"name": "gkd"}, {"train": str(rows)}
    api.train(recipe(llamas, output, method, data=data))
    rows.write_text(text.replace("hint 3", "help 3"))
    with pytest.raises(UserError, match="began with other training requests"):
        api.train(recipe(llamas, output, method, data=data, optimization={"max_steps": 4}))


def test_what_a_source_keeps_is_kept_for_both_readers():
    rollout = Rollout(3, (5, 6), (7, 0), "student", {"a": (0.5, 1.0)}, teacher_request_ids=(9, 5))
    assert from_json(json.loads(json.dumps(to_json(rollout)))) == rollout


def test_rows_too_long_for_the_teacher_are_dropped_from_training_and_counted(llamas, tmp_path):
    examples = read_examples(str(llamas / "train.jsonl"), None, "hint")
    section = recipe(llamas, tmp_path / "run", {"name": "gkd"}).teacher
    section = section.model_copy(update={"max_request_tokens": 20})
    encoder = Encoder(tiny.tokenizer(), "none", 24, 24)
    teacher = encoder.for_teacher(section, tiny.tokenizer())
    data = training_set(examples, encoder, teacher)
    assert 0 < data.num_dropped_for_teacher == len(examples) - len(data)
    assert data.longest_teacher_request <= 20
    held_out = evaluation_set(examples, encoder, teacher)
    assert held_out.num_cut_contexts == data.num_dropped_for_teacher
    assert len(held_out) == len(examples)
    assert held_out.longest_teacher_request == 20


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"context": "hints"}, "hint' would be lost"),
        ({"context": "nothing"}, "no row of data.train has it"),
        ({"system": "Be brief."}, "needs a chat template"),
        ({"context": "hint", "context_template": "{{ request"}, "is no Jinja template"),
        ({"context": "hint", "context_template": "{{ reqest }}"}, "'reqest' is undefined"),
        ({"context": "hint", "context_template": "missing.j2"}, "does not exist"),
        ({"context": "hint", "context_template": "{{ '' }}"}, "leaves nothing of the request"),
        ({"context": "hint", "max_request_tokens": 3}, "teacher.max_request_tokens = 3"),
        ({"context": "hint", "template_options": {"tokenize": 1}}, "can't be set here"),
    ],
)
def test_what_a_teacher_cannot_read_is_refused_in_a_sentence(llamas, tmp_path, teacher, says):
    unread = {"columns": {} if "hint" in str(teacher) else {"ignore": ["hint"]}}
    with pytest.raises(UserError, match=says):
        api.check(recipe(llamas, tmp_path / "run", {"name": "gkd"}, teacher, data=unread))
