"""Norms and gated activations are transformers' own: bit for bit forward, to rounding backward."""

import copy

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import tiny
from promptkd.kernels.norms_and_gates import RMSNorm, SwiGLU, save_only_inputs


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(width, dtype=torch.float32):
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.data = 1 + randn(width, seed=7, dtype=dtype) / 4
    return norm


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_gives_transformers_numbers(dtype, weights):
    norm, hidden = norm_of(24, weights), randn(2, 5, 24, dtype=dtype)
    ours = RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)
    assert torch.equal(ours, norm(hidden))
    assert ours.dtype == norm(hidden).dtype


def test_under_autocast_a_norm_gives_what_a_product_would_read():
    norm, hidden = norm_of(24), randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours = RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)
        assert torch.equal(ours, norm(hidden).bfloat16())


def test_gradients_are_those_of_the_equation():
    norm = norm_of(24)
    inputs = [randn(2, 5, 24).requires_grad_(), norm.weight]
    exact = [given.detach().double().requires_grad_() for given in inputs]
    gradient = randn(2, 5, 24, seed=1)
    hidden, weight = exact
    truth = weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    found = torch.autograd.grad(RMSNorm.apply(*inputs, 1e-5), inputs, gradient)
    expected = torch.autograd.grad(truth, exact, gradient.double())
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-5, atol=1e-6)


def test_in_bf16_a_norms_gradient_is_no_further_from_the_truth_than_autograds():
    norm, hidden = norm_of(64, torch.bfloat16), randn(50, 64).bfloat16().requires_grad_()
    gradient = randn(50, 64, seed=1).bfloat16()
    exact, wide = hidden.detach().double().requires_grad_(), copy.deepcopy(norm).double()
    truth = wide.weight * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    (true,) = torch.autograd.grad(truth, exact, gradient.double())

    def error(normalized):
        (found,) = torch.autograd.grad(normalized, hidden, gradient)
        return (found - true).norm()

    assert error(RMSNorm.apply(hidden, norm.weight, 1e-5)) < error(norm(hidden))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gated_activation_has_autograds_numbers(dtype):
    gate, up = (randn(3, 16, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    gradient = randn(3, 16, seed=3, dtype=dtype)
    ours, theirs = SwiGLU.apply(gate, up), silu(gate) * up

    assert torch.equal(ours, theirs)
    for own, other in zip(
        torch.autograd.grad(ours, [gate, up], gradient),
        torch.autograd.grad(theirs, [gate, up], gradient),
        strict=True,
    ):
        assert torch.equal(own, other)


def kept_by(hidden_states):
    """Bytes that the backward pass needs, each storage counted once."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden_states()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_a_fifth_less_and_learns_the_same(dtype):
    tokens = torch.arange(2, 2 + 2 * 40).reshape(2, 40) % 60
    plain = tiny.model("llama", num_layers=3)
    ours = tiny.language_model(copy.deepcopy(plain), 64, dtype)
    theirs = tiny.language_model(plain, 64, dtype)
    for module in theirs.module.modules():
        vars(module).pop("forward", None)  # what kernels.prepare put there

    assert kept_by(lambda: ours.hidden_states(tokens)) < 0.8 * kept_by(
        lambda: theirs.hidden_states(tokens)
    )

    gradients = []
    for model in (ours, theirs):
        model.hidden_states(tokens)[:, -1].float().square().sum().backward()
        grads = [weight.grad for weight in model.module.parameters() if weight.grad is not None]
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    own, other = gradients
    assert (own - other).norm() < (1e-5 if dtype == torch.float32 else 0.02) * other.norm()


def test_only_layers_that_compute_what_llamas_do_are_changed():
    class Scaled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    config = tiny.model("llama", num_layers=1).config
    scaled, plain = Scaled(config), LlamaMLP(config)
    other = LlamaMLP(config)
    other.act_fn = torch.nn.GELU()
    model = tiny.model("llama", num_layers=3)
    layers = (scaled, plain, other)
    for block, layer in zip(model.base_model.layers, layers, strict=True):
        block.mlp = layer
    save_only_inputs(model)

    assert [("forward" in vars(layer)) for layer in layers] == [False, True, False]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformers_code_is_still_what_is_looked_for(architecture):
    model = tiny.model(architecture, num_layers=1)
    save_only_inputs(model)

    changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert len(changed) == 2
    assert any(name.endswith("RMSNorm") for name in changed)
    assert any(name.endswith("MLP") for name in changed)
