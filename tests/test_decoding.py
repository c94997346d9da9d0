"""Tokens are those of the inverse cumulative distribution, over many blocks of tokens too."""

import pytest
import torch

from promptkd.errors import UserError
from promptkd.generation.sampling import BLOCK, GenerationSettings, TokenSampler


@pytest.mark.parametrize("vocabulary", [7, BLOCK, 5 * BLOCK + 3])
def test_a_token_is_the_first_whose_running_sum_exceeds_the_number(vocabulary):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(400, vocabulary, generator=generator)
    uniforms = torch.rand(400, generator=generator)

    chosen = TokenSampler(GenerationSettings(1))(scores, uniforms)

    upper = scores.double().softmax(-1).cumsum(-1)
    lower = torch.nn.functional.pad(upper, (1, 0))
    rows = torch.arange(400)
    assert (uniforms <= upper[rows, chosen] + 1e-6).all()
    assert (uniforms >= lower[rows, chosen] - 1e-6).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24, 1.0])
def test_a_token_that_is_left_out_is_never_chosen_not_even_by_rounding(number):
    scores = torch.full((3, 4 * BLOCK), -torch.inf)
    kept = torch.tensor([BLOCK + 1, BLOCK + 2, 3 * BLOCK - 1])
    scores[:, kept] = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))

    chosen = TokenSampler(GenerationSettings(1))(scores, torch.full((3,), number))

    assert chosen.tolist() == 3 * [kept[0 if number == 0 else -1].item()]


def test_random_numbers_are_a_function_of_the_seed_from_zero_to_one():
    choose = TokenSampler(GenerationSettings(1000))
    assert torch.equal(choose.uniforms((1, 2)), choose.uniforms((1, 2)))
    assert not torch.equal(choose.uniforms((1, 2)), choose.uniforms((2, 1)))
    assert 0 <= choose.uniforms((3,)).min() < 0.01 < 0.99 < choose.uniforms((3,)).max() <= 1


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-300}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_k": -1}],
    ids=repr,
)
def test_settings_that_define_no_law_are_refused(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"{name} is .*: it has to be"):
        GenerationSettings(1, **settings)
