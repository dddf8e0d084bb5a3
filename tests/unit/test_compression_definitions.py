"""Properties that define single methods and that a comparison with another package would not pin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compression_cases import as_lists, random_layer

from fastcache.compression.base import select
from fastcache.compression.registry import create
from fastcache.config import CompressionConfig


def make(name: str, **params):
    return create(CompressionConfig(method=name, params=params))


def kept_by(method, kv) -> list[list[list[int]]]:
    return as_lists(select(method.score(kv), kv.lengths, kv.budgets))


@pytest.mark.parametrize("n_sink", [0, 4])
def test_streaming_llm_is_sinks_and_the_latest(n_sink):
    method = make("streaming_llm", n_sink=n_sink)
    kept = kept_by(method, random_layer(method, [100, 60], [20, 10]))
    assert kept[0] == [[*range(n_sink), *range(100 - 20 + n_sink, 100)]] * 2
    assert kept[1] == [[*range(n_sink), *range(60 - 10 + n_sink, 60)]] * 2


def test_knorm_separates_norms_that_tie_in_bfloat16():
    method = make("knorm")
    kv = random_layer(method, [64], [32], size=64)
    keys = kv.keys.bfloat16()
    rounded = torch.linalg.vector_norm(keys, dim=-1)
    assert rounded.unique().numel() < rounded.numel() / 1.5, "the case must have ties"
    scores = method.score(replace(kv, keys=keys))
    assert scores.unique().numel() > 0.95 * scores.numel()


def test_snapkv_keeps_what_the_last_queries_look_for_and_its_neighbours():
    method = make("snapkv", window=4, kernel=3)
    kv = random_layer(method, [50], [7], heads=2, kv_heads=2, padding=0.0)
    kv.keys.zero_()
    kv.keys[0, :, 20] = 5.0
    kept = kept_by(method, replace(kv, window_queries=torch.ones_like(kv.window_queries)))
    assert kept == [[[19, 20, 21, 46, 47, 48, 49]] * 2]


def test_snapkv_below_its_window_keeps_the_latest():
    method = make("snapkv")
    assert kept_by(method, random_layer(method, [320], [31])) == [[[*range(289, 320)]] * 2]


def test_random_draws_anew_for_each_layer_head_and_seed():
    method = make("random")
    kv = random_layer(method, [400], [200])
    base, other_layer = kept_by(method, kv)[0], kept_by(method, replace(kv, layer=0))[0]
    other_seed = kept_by(make("random", seed=1), kv)[0]
    draws = [set(row) - set(range(4)) for row in (*base, *other_layer, *other_seed)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            # Two independent halves of 396 share 97 +- 5.
            assert 70 < len(one & other) < 125


def test_random_is_uniform_over_positions():
    method = make("random", n_sink=0)
    kv = random_layer(method, [1000], [500], kv_heads=6)
    kept = torch.tensor([row for layer in range(40) for row in kept_by(method, replace(kv, layer=layer))[0]])
    counts = torch.histc(kept.float(), bins=10, min=0, max=1000)
    # 240 rows keep 50 of each 100 positions: 12,000 +- 77.
    assert counts.sub(12_000).abs().max() < 400


def test_random_without_sinks_may_drop_the_first():
    method = make("random", n_sink=0)
    kv = random_layer(method, [200], [100])
    first = [kept_by(method, replace(kv, layer=layer))[0][0][0] for layer in range(8)]
    assert max(first) > 0
