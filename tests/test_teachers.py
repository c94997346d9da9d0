"""What is put in front of a teacher, how it starts, what learns, and that PEFT reads it back."""

import peft
import pytest
import torch

import tiny
from promptkd.divergences import reverse_kl
from promptkd.errors import UserError
from promptkd.methods import build_method
from promptkd.models.language_model import select_responses
from promptkd.models.loading import load_model
from promptkd.objectives import States, accumulate
from promptkd.teachers import (
    Adaptation,
    Frozen,
    SoftPrompt,
    TextPrompt,
    load_soft_prompt,
    prompt_vectors,
)


def teacher_model(architecture="llama"):
    module = tiny.model(architecture, num_layers=3, seed=2).requires_grad_(False)
    return tiny.language_model(module, tiny.ROWS)


def embeddings(model, text):
    return prompt_vectors(model, tiny.tokenizer()(text).input_ids)


def tokens():
    return torch.randint(2, 98, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("length", "expected"),
    [(5, "teach"), (7, "teach m"), (9, "teach met"), (12, "teach meteac")],
)
def test_start_text_is_cut_or_repeated_to_the_length(length, expected):
    model = teacher_model()
    teacher = SoftPrompt(length, "text", "teach me").build(model, tiny.tokenizer())
    assert torch.equal(teacher.soft_prompt, embeddings(model, expected))


def test_default_start_is_the_papers_sentence():
    model = teacher_model()
    teacher = SoftPrompt().build(model, tiny.tokenizer())
    assert teacher.soft_prompt.shape == (7, tiny.WIDTH)
    assert torch.equal(teacher.soft_prompt, embeddings(model, "Suppose you are a student."[:7]))


def test_padding_start_repeats_the_padding_token():
    model = teacher_model()
    teacher = SoftPrompt(4, "padding").build(model, tiny.tokenizer())
    assert torch.equal(teacher.soft_prompt, prompt_vectors(model, [tiny.PAD] * 4))


def test_padding_start_falls_back_to_the_end_token():
    model, tokenizer = teacher_model(), tiny.tokenizer()
    tokenizer.pad_token = None
    teacher = SoftPrompt(4, "padding").build(model, tokenizer)
    assert torch.equal(teacher.soft_prompt, prompt_vectors(model, [tiny.EOS] * 4))


def test_random_start_is_embeddings_drawn_with_the_seed():
    model = teacher_model()
    first, again, other = (
        SoftPrompt(6, "random", seed=seed).build(model, tiny.tokenizer()).soft_prompt
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    table = model.module.get_input_embeddings().weight
    assert all((vector == table).all(-1).any() for vector in first)


@pytest.mark.parametrize(("length", "init"), [(0, "text"), (-1, "text"), (3, "xavier")])
def test_impossible_soft_prompt_is_refused_when_built(length, init):
    with pytest.raises(ValueError, match=str(length) if length < 1 else "xavier"):
        SoftPrompt(length, init)


def test_soft_prompt_that_fills_the_context_is_refused():
    with pytest.raises(UserError, match=rf"{tiny.CONTEXT} positions .* context has {tiny.CONTEXT}"):
        SoftPrompt(tiny.CONTEXT).build(teacher_model(), tiny.tokenizer())


def test_text_without_tokens_is_refused():
    with pytest.raises(UserError, match="'' has no tokens"):
        SoftPrompt(init_text="").build(teacher_model(), tiny.tokenizer())
    with pytest.raises(UserError, match="'' has no tokens"):
        TextPrompt("").build(teacher_model(), tiny.tokenizer())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_text_prompt_is_the_text_in_front_and_learns_nothing(architecture):
    model = teacher_model(architecture)
    teacher = TextPrompt("be brief ").build(model, tiny.tokenizer())
    front = tiny.tokenizer()(["be brief "] * 2, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.hidden_states(torch.cat([front, tokens()], dim=1))[:, 9:]
        torch.testing.assert_close(teacher.hidden_states(tokens()), expected, rtol=1e-5, atol=1e-5)
        plain = teacher.plain_hidden_states(tokens())
        assert torch.equal(plain, model.hidden_states(tokens()))
    assert teacher.parameters() == []
    assert not teacher.soft_prompt.requires_grad


def test_frozen_teacher_has_one_voice_and_no_parameters():
    teacher = Frozen().build(teacher_model(), tiny.tokenizer())
    with torch.no_grad():
        adapted, plain = teacher.hidden_states(tokens()), teacher.plain_hidden_states(tokens())
    assert torch.equal(adapted, plain)
    assert teacher.parameters() == []
    assert teacher.soft_prompt is None


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_only_the_soft_prompt_receives_gradients(architecture):
    module = tiny.model(architecture, num_layers=3, seed=2).requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    teacher = SoftPrompt().build(tiny.language_model(module, tiny.ROWS), tiny.tokenizer())
    assert [id(p) for p in teacher.parameters()] == [id(teacher.soft_prompt)]
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.1)
    mask = torch.ones(2, 10, dtype=torch.bool)
    states = States(
        select_responses(teacher.hidden_states(tokens()), mask), teacher.model.head, True
    )
    target = torch.full((18, tiny.ROWS), 1 / tiny.ROWS).log()
    accumulate(
        {"teacher": states},
        lambda logprobs, piece: {"loss": reverse_kl(logprobs["teacher"], target[piece])},
        {"loss": 1 / 18},
    )
    assert teacher.soft_prompt.grad.norm(dim=-1).min() > 0  # every vector matters
    assert all(parameter.grad is None for parameter in module.parameters())
    optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_peft_loads_the_saved_soft_prompt_as_the_same_teacher(tmp_path, architecture):
    path = tmp_path / "teacher"
    tiny.model(architecture, num_layers=3, seed=2).save_pretrained(path)
    model = tiny.language_model(load_model(str(path), torch.float32), tiny.ROWS)
    teacher = SoftPrompt(5, "random").build(model, tiny.tokenizer())
    with torch.no_grad():
        teacher.soft_prompt.add_(0.1 * torch.randn(5, tiny.WIDTH))
    teacher.save(tmp_path / "adapter", str(path))
    assert torch.equal(load_soft_prompt(tmp_path / "adapter"), teacher.soft_prompt)

    adapted = peft.PeftModel.from_pretrained(
        load_model(str(path), torch.float32), tmp_path / "adapter"
    )
    with torch.no_grad():
        expected = adapted.eval()(tokens()).logits[:, 5:].flatten(0, 1).log_softmax(-1)
        hidden = teacher.hidden_states(tokens()).flatten(0, 1)
        actual = model.head.logprobs(hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert adapted.peft_config["default"].base_model_name_or_path == str(path)


def test_state_goes_back_in_as_it_came_out():
    model = teacher_model()
    first = SoftPrompt(3, "random", seed=1).build(model, tiny.tokenizer())
    second = SoftPrompt(3, "random", seed=2).build(model, tiny.tokenizer())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.soft_prompt, first.soft_prompt)
    assert second.soft_prompt.data_ptr() != first.soft_prompt.data_ptr()


def test_annealed_coefficient_starts_at_1_minus_1_over_K_and_ends_at_0():
    adaptation = Adaptation()
    coefficients = [adaptation.coefficient(step, 5) for step in range(5)]
    assert coefficients == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert coefficients[-1] == 0.0
    assert Adaptation(regularizer=0.5).coefficient(0, 5) == pytest.approx(0.4)
    assert Adaptation(regularizer=0.0).coefficient(0, 5) == 0.0
    assert Adaptation(regularizer=0.5, anneal=False).coefficient(4, 5) == 0.5


def test_a_teacher_with_nothing_to_train_is_refused_by_promptkd():
    with pytest.raises(UserError, match="nothing to"):
        build_method("promptkd", teacher="frozen")
