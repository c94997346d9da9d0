"""Keys and values kept in reserved room are those of transformers' cache."""

import torch
from transformers import DynamicCache

import tiny
from promptkd.generation.kv_cache import reserved_cache


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_reserved_cache_holds_what_the_dynamic_one_holds_after_rows_left():
    config = tiny.model("llama", num_layers=1, seed=0).config
    ours, theirs = reserved_cache(config, 7), DynamicCache(config=config)
    for length, rows in ((4, 3), (1, 3), (2, 2)):
        if rows == 2:
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor([2, 0]))
        new = randn(rows, 2, length, 8, seed=length), randn(rows, 2, length, 8, seed=length + 10)
        held, expected = ours.update(*new, 0), theirs.update(*new, 0)

        assert ours.get_seq_length() == theirs.get_seq_length()
        assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
