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


def test_tova_keeps_the_same_tokens_in_all_heads_and_always_the_last():
    kept = kept_by(make("tova"), random_layer(make("tova"), [100, 70], [30, 20]))
    for rows, length in zip(kept, (100, 70), strict=True):
        assert rows[0] == rows[1] and rows[0][-1] == length - 1


def test_keydiff_drops_what_is_like_the_others():
    method = make("keydiff")
    kv = random_layer(method, [40], [3], kv_heads=2)
    kv.keys[:] = torch.ones(16) + 0.01 * kv.keys
    odd = [5, 17, 31]
    kv.keys[:, :, odd] = -torch.ones(16)
    assert kept_by(method, kv) == [[odd] * 2]


def test_observed_attention_counts_per_query_that_could_look():
    """Entry 0 has the most mass, but over five queries; entry 4 has little, from a single one."""
    method = make("observed_attention")
    kv = random_layer(method, [5], [2], heads=1, kv_heads=1)
    mass = torch.tensor([[[2.0, 0.8, 1.5, 0.2, 0.5]]])  # per query 0.4, 0.2, 0.5, 0.1, 0.5
    assert kept_by(method, replace(kv, attention_mass=mass)) == [[[2, 4]]]


@pytest.mark.parametrize(
    ("params", "kept"),
    [({"recent": 0.0}, [0, 1, 2, 3]), ({}, [0, 2, 6, 7]), ({"recent": 0.75}, [0, 5, 6, 7])],
)
def test_h2o_spends_a_share_on_the_latest_and_the_rest_on_heavy_hitters(params, kept):
    method = make("h2o", **params)
    kv = random_layer(method, [8], [4], heads=2, kv_heads=1)
    mass = torch.tensor(
        [[[9.0, 8, 5, 4, 1, 0, 0, 0], [9.0, 1, 5, 3, 1, 0, 0, 0]]]
    )  # means 9, 4.5, 5, 3.5, ...
    assert kept_by(method, replace(kv, attention_mass=mass)) == [[kept]]


def test_expected_attention_is_the_mean_of_a_log_normal_over_rotated_queries():
    """Against the definition written out: one rotation matrix per future position, one head at a time."""
    method, length, size = make("expected_attention", n_future=20), 50, 16
    kv = random_layer(method, [length], [20], heads=6, kv_heads=2, size=size)
    rotation = torch.zeros(size, size, dtype=torch.float64)
    for position in range(length, length + 20):
        for i, angle in enumerate(position * kv.inv_freq.double()):
            block = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
            pair = torch.tensor([i, i + size // 2])
            rotation[pair[:, None], pair] += block / 20
    for kv_head in range(2):
        keys, values = kv.keys[0, kv_head, 4:].double(), kv.values[0, kv_head, 4:].double()
        weights = torch.zeros(length - 4, dtype=torch.float64)
        for head in range(3 * kv_head, 3 * kv_head + 3):
            mean = rotation @ kv.query_mean[0, head].double()
            cov = rotation @ kv.query_cov[0, head].double() @ rotation.T
            logit = keys @ mean / size**0.5 + torch.einsum("ti,ij,tj->t", keys, cov, keys) / (2 * size)
            weights += logit.exp() / logit.exp().sum() / 3
        expected = weights * values.norm(dim=-1)
        torch.testing.assert_close(method.score(kv)[0, kv_head, 4:], expected.float(), rtol=1e-3, atol=1e-7)
