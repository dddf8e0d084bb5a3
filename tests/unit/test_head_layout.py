"""Where the entries of heads with different lengths lie: the arithmetic against a table built one entry at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from head_budget_files import write_budgets

from fastcache.attention.base import HeadShape
from fastcache.attention.ragged import RaggedAttention, Rows
from fastcache.attention.torch_sdpa import TorchSDPA
from fastcache.compression.head_budgets import FLOOR, HeadBudgets, divide
from fastcache.errors import ConfigError
from fastcache.kvcache.head_layout import HeadLayout, HeadRows, LayoutTable, entry_rows
from fastcache.kvcache.pool import KVPool, KVShape

LAYERS, HEADS, PAGE = 3, 2, 4


def units_one_by_one(kept, appended):
    """unit number of each (head, block), taken in the order in which the engine needs them."""
    taken, count = {}, 0
    for head, entries in enumerate(kept.ravel()):
        for block in range(-(-entries // PAGE)):
            taken[head, block], count = count, count + 1
    for extra in range(1, appended + 1):
        for head, entries in enumerate(kept.ravel()):
            block = (entries + extra - 1) // PAGE
            if (head, block) not in taken:
                taken[head, block], count = count, count + 1
    return taken, count


@pytest.mark.parametrize("seed", range(6))
def test_every_entry_has_a_place_of_its_own(seed):
    rng = np.random.default_rng(seed)
    kept = rng.integers(0, 30, (LAYERS, HEADS)) if seed else np.zeros((LAYERS, HEADS), np.int64)
    layout, appended = HeadLayout(kept, PAGE), 37
    taken, count = units_one_by_one(kept, appended)
    for extra in range(appended + 1):
        assert layout.pages(extra) == -(-units_one_by_one(kept, extra)[1] // kept.size)
    pool = KVPool(KVShape(LAYERS, HEADS, 2, torch.float32), 60, PAGE, torch.device("cpu"))
    pages = rng.permutation(np.arange(1, 60))[: layout.pages(appended)]
    table = torch.from_numpy(pages[None].astype(np.int32))
    packed, seen = torch.from_numpy(layout.packed()[None]), set()
    for layer in range(LAYERS):
        length = int(kept[layer].max()) + appended
        rows = entry_rows(pool, HeadRows(packed, layer, HEADS), table, torch.arange(length)[None, None])[0]
        for head in range(HEADS):
            for entry in range(kept[layer, head] + appended):
                unit = taken[layer * HEADS + head, entry // PAGE]
                page, place = pages[unit // kept.size], unit % kept.size
                where = np.ravel_multi_index(
                    (place // HEADS, page, place % HEADS, entry % PAGE), (LAYERS, 60, HEADS, PAGE)
                )
                assert rows[head, entry] == where
                seen.add(int(where))
    assert len(seen) == kept.sum() + kept.size * appended
    assert count <= layout.pages(appended) * kept.size


def test_a_cache_that_kept_nothing_apart_is_the_plain_layout():
    pool = KVPool(KVShape(LAYERS, HEADS, 2, torch.float32), 9, PAGE, torch.device("cpu"))
    table = LayoutTable(pool, 2)
    pages, new = torch.tensor([[5, 3]], dtype=torch.int32), torch.randn(2, 7, HEADS, 2)
    for layer in range(LAYERS):
        rows = entry_rows(pool, HeadRows(table.packed[:1], layer, HEADS), pages, torch.arange(7)[None, None])
        pool.write_rows(rows[0].T, *new)
        keys, values = pool.gather(layer, pages, 7)
        assert torch.equal(keys[0], new[0].transpose(0, 1)) and torch.equal(values[0], new[1].transpose(0, 1))


def test_a_seat_goes_back_to_the_plain_layout():
    pool = KVPool(KVShape(LAYERS, HEADS, 2, torch.float32), 9, PAGE, torch.device("cpu"))
    table = LayoutTable(pool, 2)
    plain, layout = table.packed.clone(), HeadLayout(np.full((LAYERS, HEADS), 5), PAGE)
    table.sync([1], [layout])
    assert table.ragged.tolist() == [False, True] and table.longest.tolist() == [0, 5]
    assert not torch.equal(table.packed[1], plain[1])
    table.sync([1], [None])
    assert torch.equal(table.packed, plain) and not table.ragged.any()


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("length", [1, 5, 65, 1000, 4096])
def test_heads_share_exactly_what_equal_budgets_would_keep(tmp_path, ratio, length):
    shares = write_budgets(tmp_path / "b.json", 5, 3, ratio)
    kept = HeadBudgets.load(tmp_path / "b.json").kept(length, ratio)
    equal = max(1, int(length * (1 - ratio)))
    assert kept.sum() == equal * 15
    assert kept.min() >= min(FLOOR, equal) and kept.max() <= length
    if length == 4096:  # the floor of a few entries is all that moves
        assert np.abs(kept / length - shares).max() < 0.01


def test_between_calibrated_ratios_shares_are_linear(tmp_path):
    entries = [
        {"compression_ratio": r, "shares": [[1 - r + d, 1 - r - d]]} for r, d in ((0.4, 0.2), (0.8, 0.1))
    ]
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"format": "fastcache-head-budgets-1", "budgets": entries}))
    budgets = HeadBudgets.load(path)
    assert np.allclose(budgets.at(0.6), [[0.55, 0.25]])
    assert np.allclose(budgets.at(0.2), [[0.9, 0.7]])
    assert np.allclose(budgets.at(0.9), [[0.15, 0.05]])


def test_divide_respects_both_bounds():
    counts = divide(np.asarray([0.0, 1.0, 1.0, 50.0]), 100, 2, 60)
    assert counts.sum() == 100 and counts[0] == 2 and counts[3] == 60


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "b.json").write_text('{"format": "other"}')
    with pytest.raises(ConfigError, match="calibrate"):
        HeadBudgets.load(tmp_path / "b.json")


def test_rows_of_a_sequence_share_what_they_read_and_see_each_their_own_part(monkeypatch):
    """Five tokens behind one compressed context, one behind another: each as if it came alone."""
    rng = np.random.default_rng(0)
    pool = KVPool(KVShape(LAYERS, HEADS, 16, torch.float32), 80, PAGE, torch.device("cpu"))
    for tensor in (pool.keys, pool.values):
        tensor.normal_()
    table, layouts = (
        LayoutTable(pool, 3),
        [HeadLayout(rng.integers(4, n, (LAYERS, HEADS)), PAGE) for n in (60, 9)],
    )
    table.sync((2, 0), layouts)
    pages = torch.from_numpy(rng.permutation(np.arange(1, 81))[:60].reshape(2, 30).astype(np.int32) % 80)
    which = torch.tensor([0] * 5 + [1])
    rows = Rows(torch.tensor([2, 0])[which], torch.tensor([3, 4, 5, 6, 7, 2]), pages[which], 70)
    backend = RaggedAttention(TorchSDPA(pool, HeadShape(6, HEADS, 16)), table)
    q, read, shapes = torch.randn(6, 6, 16), pool.read_rows, []
    monkeypatch.setattr(pool, "read_rows", lambda where: shapes.append(where.shape) or read(where))
    for layer in range(LAYERS):
        together = backend._attend(layer, q, rows)
        alone = [backend._attend(layer, q[i : i + 1], rows.pick(torch.tensor([i]))) for i in range(6)]
        assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert shapes[0] == (2, HEADS, 70)
