"""Every method keeps what kvpress keeps, per layer and KV head, on tiny random Llama and Qwen3 models."""

from __future__ import annotations

import functools

import pytest
import torch
from kvpress import RandomPress
from kvpress.utils import compute_n_kept
from kvpress_oracle import (
    COMPARED,
    PRESSES,
    RATIOS,
    differences,
    keep,
    kept_positions,
    layer_kv,
    load_model,
    prefill,
    record_prefill,
    swaps,
)

from fastcache.compression.base import budget
from fastcache.compression.registry import METHODS, TRANSFORMS, create
from fastcache.config import CompressionConfig

# 1000 x 0.2 and 320 x 0.2 fall just below an integer in floating point; 65 is one more than SnapKV's window.
LENGTHS = (65, 320, 1000, 1024)
MODELS = [
    pytest.param((arch, heads, kv_heads), id=f"{arch}-G{heads // kv_heads}")
    for arch in ("llama", "qwen3")
    for heads, kv_heads in ((2, 2), (6, 2), (8, 2))
]


@pytest.fixture(scope="session")
def recorded(tiny_model):
    """`recorded((arch, heads, kv_heads), length)` -> the layers of one prefill, made once."""

    @functools.cache
    def model_of(shape):
        arch, heads, kv_heads = shape
        return load_model(tiny_model(arch, heads, kv_heads, head_dim=16, seed=7))

    @functools.cache
    def record(shape, length):
        return record_prefill(model_of(shape), prompt(length))

    record.model_of = model_of
    return record


def prompt(length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def make(name: str):
    return create(CompressionConfig(method=name))


def test_every_method_has_an_oracle_or_a_reason():
    assert set(PRESSES) == set(METHODS) - TRANSFORMS


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("name", COMPARED)
def test_kept_sets_equal_kvpress(recorded, name, shape, length):
    method = make(name)
    for layer, record in enumerate(recorded(shape, length)):
        for ratio in RATIOS:
            assert not differences(method, record, ratio), f"layer {layer}, ratio {ratio}"


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", sorted(set(METHODS) - TRANSFORMS))
def test_a_padded_batch_keeps_what_each_prompt_keeps_alone(recorded, name, ratio):
    method, shape = make(name), ("llama", 6, 2)
    records = [recorded(shape, length) for length in LENGTHS]
    budgets = [budget(length, ratio) for length in LENGTHS]
    for same_layer in zip(*records, strict=True):
        _, together = keep(method, layer_kv(list(same_layer), method, budgets))
        for row, record, kept in zip(together, same_layer, budgets, strict=True):
            scores, alone = keep(method, layer_kv([record], method, [kept]))
            assert not swaps(row[:, :kept], alone[0], scores[0])
            assert (row[:, kept:] == -1).all()


@pytest.mark.parametrize("name", COMPARED)
def test_the_recorder_sees_what_kvpress_really_does(recorded, name):
    """The oracle itself: a press run the way its users run it leaves the very cache that was recorded."""
    shape, length, ratio = ("qwen3", 6, 2), 320, 0.5
    cache = prefill(recorded.model_of(shape), prompt(length), PRESSES[name](ratio))
    for layer, record in zip(cache.layers, recorded(shape, length), strict=True):
        left = kept_positions(record.keys, layer.keys[0])
        assert torch.equal(left, record.kept[name, ratio])


@pytest.mark.parametrize("ratio", [*RATIOS, 0.1, 1 / 3, 0.75, 0.99])
def test_the_rounding_rule_is_kvpress_s(ratio):
    for length in range(1, 1100):
        assert budget(length, ratio) == compute_n_kept(length, ratio)


def test_snapkv_below_its_window_keeps_the_latest_of_what_kvpress_may_keep(recorded):
    """On purpose: kvpress protects 64 entries, keeps 31 or 63 of them, and which ones is up to top-k."""
    method, length = make("snapkv"), 320
    for ratio in (0.8, 0.9):
        kept = budget(length, ratio)
        record = recorded(("llama", 6, 2), length)[0]
        assert (record.kept["snapkv", ratio] >= length - 64).all()
        _, mine = keep(method, layer_kv([record], method, [kept]))
        assert mine[0].tolist() == [[*range(length - kept, length)]] * 2


def test_random_keeps_the_sinks_that_kvpress_does_not(recorded):
    length, ratio = 320, 0.9
    record = recorded(("llama", 6, 2), length)[0]
    cache = prefill(recorded.model_of(("llama", 6, 2)), prompt(length), RandomPress(ratio, seed=0))
    theirs = kept_positions(record.keys, cache.layers[0].keys[0])
    method = make("random")
    _, mine = keep(method, layer_kv([record], method, [budget(length, ratio)]))
    assert mine[0].shape == theirs.shape
    assert (mine[0, :, :4] == torch.arange(4)).all()
    assert not (theirs[:, :4] == torch.arange(4)).all()
