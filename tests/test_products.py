"""Products by blocks or with weights laid out anew are torch's own, in every shape."""

import pytest
import torch
import torch.nn.functional as F

from promptkd.kernels import matmul
from promptkd.kernels.matmul import BLOCK, FEWEST_BLOCKS, GenerationMatmuls, add_outer, linear


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (200, 24), (2, 3, 24), (24,)])
@pytest.mark.parametrize("rows", [3, FEWEST_BLOCKS * BLOCK, FEWEST_BLOCKS * BLOCK + 17])
def test_products_by_blocks_are_torchs_own(shape, rows, biased):
    tokens, weight = randn(*shape, seed=1), randn(rows, 24, seed=2)
    bias = randn(rows, seed=3) if biased else None
    torch.testing.assert_close(linear(tokens, weight, bias), F.linear(tokens, weight, bias))


def test_rows_of_a_longer_table_are_multiplied_where_they_are():
    table = randn(2 * FEWEST_BLOCKS * BLOCK, 24, seed=1)
    tokens, shared = randn(5, 24, seed=2), table[: FEWEST_BLOCKS * BLOCK + 1]
    torch.testing.assert_close(linear(tokens, shared), F.linear(tokens, shared))


def test_modules_lay_out_their_weights_within_the_context_alone(monkeypatch):
    layer, tokens = torch.nn.Linear(24, 70), randn(5, 24)
    calls, given = [], GenerationMatmuls.linear
    monkeypatch.setattr(GenerationMatmuls, "linear", lambda *a: calls.append(a) or given(*a))
    with torch.no_grad():
        outside = layer(tokens)
        with GenerationMatmuls().within(torch.nn.Sequential(layer)):
            inside = layer(tokens)
        assert len(calls) == 1
        layer(tokens)

    assert len(calls) == 1
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (40, 24), (2, 3, 24)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_weights_that_are_laid_out_anew_give_torchs_products(dtype, error, shape, biased):
    products = GenerationMatmuls()
    layer = torch.nn.Linear(24, 70, bias=biased).to(dtype)
    with torch.no_grad(), products.within(layer):
        for seed in (1, 2):  # with the weight as it was laid out the first time
            tokens = randn(*shape, seed=seed).to(dtype)
            exact = F.linear(*(None if x is None else x.double() for x in (tokens, *given(layer))))
            assert (layer(tokens) - exact).norm() < error * exact.norm()


def given(layer):
    return layer.weight, layer.bias


def outer(into_dtype, dtype):
    """A gradient that is there, and what 7 tokens add to all of its rows but the last two."""
    there, gradient, states = randn(12, 5).to(into_dtype), randn(7, 10, seed=1), randn(7, 5, seed=2)
    gradient, states = gradient.to(dtype), states.to(dtype)
    sums = there.double()
    sums[:10] += gradient.double().T @ states.double()
    return there, gradient, states, sums


@pytest.mark.parametrize(
    ("into", "dtype", "error"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 2**-8),
        (torch.bfloat16, torch.bfloat16, 2**-7),
    ],
)
def test_a_weights_gradient_is_added_to_the_rows_that_are_compared(monkeypatch, into, dtype, error):
    monkeypatch.setattr(matmul, "SLICE", 4)
    there, gradient, states, sums = outer(into, dtype)
    before = there[10:].clone()
    add_outer(there[:10], gradient, states)
    assert there.dtype == into
    assert (there - sums).norm() < error * sums.norm()
    assert torch.equal(there[10:], before)


def test_on_a_card_it_is_one_product_summed_in_place(monkeypatch):
    """What ``addmm`` is given: torch checks it without numbers, and float64 stands for the card."""
    real, calls = torch.addmm, []

    def addmm(input, mat1, mat2, *, out_dtype, out):
        asked = [each.to("meta") for each in (input, mat1, mat2)]
        assert real(*asked, out_dtype=out_dtype, out=asked[0]).shape == out.shape
        assert out is input  # or it would be copied first
        calls.append(out_dtype)
        return out.copy_(input.double() + mat1.double() @ mat2.double())

    monkeypatch.setattr(matmul, "_sums_in_fp32", lambda into: True)
    monkeypatch.setattr(torch, "addmm", addmm)
    there, gradient, states, sums = outer(torch.float32, torch.bfloat16)
    before = there[10:].clone()
    add_outer(there[:10], gradient, states)
    torch.testing.assert_close(there.double(), sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(there[10:], before)
    assert calls == [torch.float32]
