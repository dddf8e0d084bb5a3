"""What every registered method owes the engine: a new name in the registry is tested without a change."""

from __future__ import annotations

import pytest
import torch
from compression_cases import as_lists, random_layer, without

from fastcache.compression.base import budget, select
from fastcache.compression.registry import METHODS, TRANSFORMS, create
from fastcache.config import CompressionConfig
from fastcache.errors import ConfigError

RATIOS = (0.2, 0.5, 0.8, 0.9)
LENGTHS = [211, 90, 150]


def eviction_methods() -> list[str]:
    return sorted(set(METHODS) - TRANSFORMS)


@pytest.fixture(params=eviction_methods())
def method(request):
    return create(CompressionConfig(method=request.param))


def kept_by(method, kv) -> list[list[list[int]]]:
    return as_lists(select(method.score(kv), kv.lengths, kv.budgets))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 2)], ids=["G1", "G3", "G4"])
def test_each_head_keeps_its_budget_within_the_length(method, ratio, heads, kv_heads):
    budgets = [budget(n, ratio) for n in LENGTHS]
    kv = random_layer(method, LENGTHS, budgets, heads, kv_heads)
    scores = method.score(kv)
    assert scores.shape == (3, kv_heads, 211) and scores.dtype == torch.float32
    for rows, length, wanted in zip(kept_by(method, kv), LENGTHS, budgets, strict=True):
        for row in rows:
            assert len(row) == wanted and row[-1] < length


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_sequence_keeps_the_same_entries_alone_and_in_a_padded_batch(method, ratio):
    budgets = [budget(n, ratio) for n in LENGTHS]
    together = kept_by(method, random_layer(method, LENGTHS, budgets))
    alone = [
        kept_by(method, random_layer(method, [n], [kept]))[0]
        for n, kept in zip(LENGTHS, budgets, strict=True)
    ]
    assert together == alone


def test_scores_are_minus_infinity_on_padding_and_infinite_within_the_budget(method):
    method = create(CompressionConfig(method=method.name, params={"n_sink": 4}))
    kv = random_layer(method, LENGTHS, [1, 3, 80])
    scores = method.score(kv)
    for row, length, kept in zip(scores, LENGTHS, (1, 3, 80), strict=True):
        assert row[:, length:].isneginf().all() and not row[:, :length].isneginf().any()
        assert (row.isposinf().sum(-1) <= kept).all()


def test_padding_never_matters(method):
    budgets = [budget(n, 0.5) for n in LENGTHS]
    sets = [
        kept_by(method, random_layer(method, LENGTHS, budgets, padding=padding))
        for padding in (float("nan"), float("inf"), 0.0, 1e4)
    ]
    assert sets[0] == sets[1] == sets[2] == sets[3]


def test_nothing_undeclared_is_read(method):
    kv = random_layer(method, LENGTHS, [budget(n, 0.5) for n in LENGTHS])
    assert kept_by(method, without(kv, method.needs)) == kept_by(method, kv)


def test_a_declared_need_is_insisted_on(method):
    kv = random_layer(method, LENGTHS, [50, 50, 50])
    for need in method.needs - {"keys"}:
        with pytest.raises(AssertionError, match=f"{method.name} was not given .*{need}"):
            method.score(without(kv, method.needs - {need}))


def test_what_is_protected_stays(method):
    smallest = method.min_budget
    kv = random_layer(method, LENGTHS, [smallest] * 3)
    for rows, length in zip(kept_by(method, kv), LENGTHS, strict=True):
        expected = {*range(method.n_sink), *range(length - method.window, length)}
        assert all(expected <= set(row) for row in rows)


@pytest.mark.parametrize("kept", [1, 3, 5, 40])
def test_protection_is_cut_to_the_budget_sinks_first_then_the_latest(method, kept):
    method = create(CompressionConfig(method=method.name, params={"n_sink": 4}))
    kv = random_layer(method, LENGTHS, [kept] * 3)
    for rows, length in zip(kept_by(method, kv), LENGTHS, strict=True):
        sinks, recent = min(4, kept), min(method.window, max(0, kept - 4))
        expected = {*range(sinks), *range(length - recent, length)}
        assert all(len(row) == kept and expected <= set(row) for row in rows)


def test_each_head_may_have_its_own_budget(method):
    kv = random_layer(method, LENGTHS, [[100, 70], [80, 66], [66, 149]])
    sizes = [[len(row) for row in rows] for rows in kept_by(method, kv)]
    assert sizes == kv.budgets.tolist()


def test_bfloat16_is_accepted_and_scored_in_float32(method):
    kv = random_layer(method, LENGTHS, [100, 70, 80])
    half = {name: getattr(kv, name).bfloat16() for name in ("keys", "values", "window_queries")}
    scores = method.score(kv.__class__(**{**kv.__dict__, **half}))
    assert scores.dtype == torch.float32 and not scores.isnan().any()


def test_a_prompt_applies_from_the_minimum_on(method):
    least = method.min_budget
    assert method.applies_to(1000, least)
    assert not method.applies_to(1000, least - 1)
    assert not method.applies_to(least, least), "nothing would be dropped"


def test_check_names_the_minimum(method):
    method.check(1000, 0.5)
    with pytest.raises(ConfigError, match=f"{method.name} .* keep at least {method.min_budget} .*n_sink"):
        method.check(method.min_budget, 0.5)


def test_methods_differ_from_each_other():
    """Each name must be a method of its own, not another one's under a different name."""
    kept = {}
    for name in eviction_methods():
        method = create(CompressionConfig(method=name))
        kept[name] = str(kept_by(method, random_layer(method, [300], [150])))
    assert len(set(kept.values())) == len(eviction_methods())
