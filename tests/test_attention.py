"""Grouped attention is that of torch's kernels up to rounding, forward and backward."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import runs
import tiny
from promptkd.errors import UserError
from promptkd.kernels import attention
from promptkd.kernels.attention import (
    BLOCK,
    CausalAttention,
    attend_grouped,
    grouped_sdpa,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def module_of(heads, shared, is_causal=True):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // shared, is_causal
    return module


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("heads", "shared", "time"), [(6, 2, 1), (6, 6, 1), (6, 2, 5)])
def test_grouped_attention_is_transformers_own(heads, shared, time, masked):
    query = randn(3, heads, time, 8, seed=1)
    key, value = randn(3, shared, 9, 8, seed=2), randn(3, shared, 9, 8, seed=3)
    mask = randn(3, 1, time, 9, seed=4) > -0.5 if masked else None
    arguments = (module_of(heads, shared), query, key, value, mask)

    ours, _ = grouped_sdpa(*arguments, scaling=0.3)
    theirs, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


def each_alone(query, key, value, lengths, scale):
    """Sequences end to end, one after the other by torch's kernel."""
    parts = zip(*(given.split(lengths) for given in (query, key, value)), strict=True)
    mixed = [
        scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in rows),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for rows in parts
    ]
    return torch.cat(mixed)


@pytest.mark.parametrize(
    "lengths",
    [
        [2 * BLOCK + 3] * 2,
        [BLOCK],
        [2],
        [3 * BLOCK, 2 * BLOCK + 1, BLOCK, BLOCK - 1, 1],
        [1, BLOCK + 2, 5, 2 * BLOCK],  # the longest need not come first
    ],
)
@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 4), (2, 1)])
def test_whole_sequences_have_the_derivatives_of_torchs_kernel(heads, shared, lengths):
    num_tokens = sum(lengths)
    inputs = [
        randn(num_tokens, count, 8, seed=seed).requires_grad_()
        for seed, count in enumerate((heads, shared, shared))
    ]
    gradient = randn(num_tokens, heads, 8, seed=9)

    ours = CausalAttention.apply(*inputs, lengths, 0.3)
    theirs = each_alone(*inputs, lengths, 0.3)

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, gradient),
        torch.autograd.grad(theirs, inputs, gradient),
        rtol=1e-5,
        atol=1e-6,  # keys and values sum in fp32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_see_themselves_alone_whatever_the_mask(dtype):
    lengths = [BLOCK + 7, 9, 1]
    rows = [randn(sum(lengths), count, 8, seed=count, dtype=torch.float32) for count in (6, 2, 2)]
    expected = each_alone(*rows, lengths, 0.3)
    query, key, value = (given.to(dtype).transpose(0, 1)[None] for given in rows)
    mask = torch.tensor(lengths).view(1, 1, 1, -1)

    actual, _ = grouped_sdpa(module_of(6, 2), query, key, value, mask, scaling=0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual[0].float(), expected, rtol=tolerance, atol=tolerance)


def test_on_a_card_packed_sequences_attend_as_they_lie_and_learn_the_same(monkeypatch):
    """What ``varlen_attn`` is given, whose contract a loop keeps here; queries may be fp32."""
    lengths = [5, 9, 1, 9]
    rows = [randn(sum(lengths), count, 8, seed=count).requires_grad_() for count in (6, 2, 2)]
    expected = each_alone(*rows, lengths, 0.3)

    def varlen_attn(query, key, value, ends, same, longest, longest_key, *, scale, **causal):
        assert causal == {"window_size": (-1, 0), "enable_gqa": True}
        assert (ends.dtype, longest, longest_key) == (torch.int32, 9, 9)
        assert torch.equal(ends, same)
        assert query.dtype == key.dtype == value.dtype
        return each_alone(query, key, value, ends.diff().tolist(), scale)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_has_varlen", lambda key, value: True)
    query, key, value = (given.transpose(0, 1)[None] for given in rows)
    mask = torch.tensor(lengths).view(1, 1, 1, -1)
    actual, _ = grouped_sdpa(module_of(6, 2), query.float(), key, value, mask, scaling=0.3)

    torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-6)
    outer = randn(*expected.shape, seed=9)
    torch.testing.assert_close(
        torch.autograd.grad(actual[0], rows, outer),
        torch.autograd.grad(expected, rows, outer),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("dtype", "widths", "device", "has"),
    [
        (torch.bfloat16, (64, 64), "cuda", True),
        (torch.float32, (64, 64), "cuda", False),
        (torch.bfloat16, (192, 128), "cuda", False),
        (torch.bfloat16, (512, 512), "cuda", False),
        (torch.bfloat16, (64, 64), "cpu", False),
    ],
)
def test_heads_that_the_kernel_of_cards_does_not_take_are_laid_side_by_side(
    dtype, widths, device, has
):
    with FakeTensorMode():
        given = [torch.empty(1, 2, 5, width, dtype=dtype, device=device) for width in widths]
        assert attention._has_varlen(*given) == has


def test_in_bf16_it_is_within_twice_the_rounding_of_torchs_kernel():
    shapes = [(2, heads, 3 * BLOCK, 32) for heads in (6, 2, 2)]
    inputs = [randn(*shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate(shapes)]
    exact = [given.detach().double().requires_grad_() for given in inputs]
    gradient = randn(*shapes[0], seed=9).bfloat16()
    arguments = {"is_causal": True, "enable_gqa": True}
    truth = scaled_dot_product_attention(*exact, **arguments)
    true_gradients = torch.autograd.grad(truth, exact, gradient.double())

    def errors(mixed):
        found = torch.autograd.grad(mixed, inputs, gradient)
        pairs = zip((mixed, *found), (truth, *true_gradients), strict=True)
        return [(own - true).norm() / true.norm() for own, true in pairs]

    ours, _ = grouped_sdpa(module_of(6, 2), *inputs, None)
    theirs = scaled_dot_product_attention(*inputs, **arguments)
    for own, other in zip(errors(ours.transpose(1, 2)), errors(theirs), strict=True):
        assert own < max(2 * other, 2**-8)


def test_gradients_of_master_weights_are_about_as_exact_as_with_eager_attention():
    tokens = torch.arange(2, 2 + 2 * (BLOCK + 6)).reshape(2, -1) % 60

    def gradients(dtype, attention):
        module = tiny.model("llama", num_layers=2, seed=0)
        model = tiny.language_model(module, 64, dtype)
        if attention:
            module.set_attn_implementation(attention)
        model.hidden_states(tokens)[:, -1].float().square().sum().backward()
        weights = [w for w in module.base_model.parameters() if w.grad is not None]
        assert all(weight.grad.dtype == torch.float32 for weight in weights)
        return torch.cat([weight.grad.flatten() for weight in weights])

    exact = gradients(torch.float32, "sdpa")
    ours, eager = (gradients(torch.bfloat16, attention) for attention in (None, "eager"))
    assert (ours - exact).norm() < 1.5 * (eager - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("case", ["masked", "looks both ways", "has a past"])
def test_only_whole_causal_sequences_are_cut_into_blocks(case):
    shared = 9 if case == "has a past" else 5
    query = randn(2, 4, 5, 8, seed=1, dtype=torch.float32).bfloat16()
    key, value = (randn(2, 2, shared, 8, seed=s).bfloat16() for s in (2, 3))
    mask = torch.ones(2, 1, 5, shared, dtype=torch.bool) if case == "masked" else None
    arguments = (module_of(4, 2, case != "looks both ways"), query, key, value, mask)

    ours, _ = grouped_sdpa(*arguments)
    theirs, _ = sdpa_attention_forward(*arguments)
    assert torch.equal(ours, theirs)


def test_a_saved_model_attends_as_its_users_choose(tmp_path):
    model = tiny.model("llama", num_layers=1, seed=0)
    attend_grouped(model)
    model.save_pretrained(tmp_path)

    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_model_that_asks_for_another_attention_keeps_it():
    model = tiny.model("llama", num_layers=1, seed=0)
    model.set_attn_implementation("eager")
    tiny.language_model(model, 64)

    assert model.config._attn_implementation == "eager"


def test_a_run_attends_as_its_recipe_says_and_learns_the_same(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    losses = {}
    for name in ("auto", "sdpa", "eager"):
        raw = tiny.recipe(tmp_path, method={"name": "promptkd"}, attention=name)
        raw["optimization"] |= {"max_steps": 2, "optimizer": "sgd"}
        run = runs.train(raw | {"output": str(tmp_path / name)})
        losses[name] = [row["loss"] for row in runs.json_lines(run / "metrics.jsonl")]
    assert losses["sdpa"] == pytest.approx(losses["auto"], rel=1e-4)
    assert losses["eager"] == pytest.approx(losses["auto"], rel=1e-4)


def test_flash_attention_without_a_gpu_is_refused(tmp_path):
    tiny.save_pair(tmp_path)
    tiny.write_data(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"attention is flash, which needs a GPU"):
        runs.train(tiny.recipe(tmp_path, attention="flash"))
