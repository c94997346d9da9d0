"""Keys and values kept and read without copies are those of transformers' cache and attention."""

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny
from promptkd.keys_values import grouped_attention, grouped_sdpa, reserved_cache


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("heads", "shared", "time"), [(6, 2, 1), (6, 6, 1), (6, 2, 5)])
def test_grouped_attention_is_transformers_own(heads, shared, time, masked):
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared
    query = randn(3, heads, time, 8, seed=1)
    key, value = randn(3, shared, 9, 8, seed=2), randn(3, shared, 9, 8, seed=3)
    mask = randn(3, 1, time, 9, seed=4) > -0.5 if masked else None
    arguments = (module, query, key, value, mask)

    ours, _ = grouped_sdpa(*arguments, scaling=0.3)
    theirs, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


def test_a_reserved_cache_holds_what_the_dynamic_one_holds_after_rows_left():
    config = tiny.model("llama", num_layers=1, seed=0).config
    ours, theirs = reserved_cache(config, 7), DynamicCache(config=config)
    for length, rows in ((4, 3), (1, 3), (2, 2)):
        if rows == 2:
            for cache in (ours, theirs):
                cache.batch_select_indices(torch.tensor([2, 0]))
        new = randn(rows, 2, length, 8, seed=length), randn(rows, 2, length, 8, seed=length + 10)
        held, expected = ours.update(*new, 0), theirs.update(*new, 0)

        assert ours.get_seq_length() == theirs.get_seq_length()
        assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_a_model_attends_as_before_once_writing_has_ended():
    model = tiny.model("llama", num_layers=1, seed=0)
    own = model.config._attn_implementation
    with grouped_attention(model):
        assert model.config._attn_implementation != own

    assert model.config._attn_implementation == own == "sdpa"
