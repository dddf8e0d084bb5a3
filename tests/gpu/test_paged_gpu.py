"""Contexts compressed out of their pages on the GPU: Triton against torch, and against the step's own tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
LAYERS, HEADS, SIZE, PAGE = 2, 8, 128, 16
LENGTHS, BUDGETS = [1000, 16, 705], [200, 15, 641]
STORED = [torch.bfloat16, torch.float8_e4m3fn]


def filled(stored):
    from fastcache.kvcache.pool import KVPool, KVShape, to_stored

    torch.manual_seed(0)
    pool = KVPool(KVShape(LAYERS, HEADS, SIZE, torch.bfloat16, stored), 400, PAGE, CUDA)
    for x in (pool.keys, pool.values):
        x.copy_(to_stored(torch.randn(x.shape, device=CUDA, dtype=torch.bfloat16), stored))
    return pool


def tables(counts):
    from fastcache.compression.work import page_tables

    numbers = iter((1 + np.random.default_rng(0).permutation(399)).tolist())
    return torch.from_numpy(page_tables([[next(numbers) for _ in range(n)] for n in counts])).to(CUDA)


def snapshot(pool):
    return [x[:, 1:].view(torch.uint8).clone() for x in (pool.keys, pool.values)]


def restored(pool, before, repack, *arguments):
    """What `repack` leaves in a pool that held `before`."""
    for x, y in zip((pool.keys, pool.values), before, strict=True):
        x[:, 1:].view(torch.uint8).copy_(y)
    repack(pool, *arguments)
    return snapshot(pool)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("length", [1, 16, 1000])
def test_gathered_entries_are_those_of_the_reference(stored, length):
    from fastcache.kvcache import gather_triton, pool

    made, table = filled(stored), tables([-(-n // PAGE) for n in LENGTHS])
    for pages in (made.keys[1], made.values[0]):
        want = pool.gather_pages(pages, table, length, torch.bfloat16)
        assert torch.equal(gather_triton.gather_pages(pages, table, length, torch.bfloat16), want)
    assert made._gather is gather_triton.gather_pages


@pytest.mark.parametrize("stored", STORED)
def test_pages_are_copied_as_the_reference_copies_them(stored):
    from fastcache.compression import base, repack, repack_triton

    pool = filled(stored)
    every = tables([-(-n // PAGE) for n in LENGTHS + BUDGETS])
    lengths, budgets = torch.tensor(LENGTHS, device=CUDA), torch.tensor(BUDGETS, device=CUDA)
    kept = base.select(torch.randn(3, HEADS, 1000, device=CUDA), lengths, budgets)
    arguments, before = (1, every[:3], kept, every[3:, :41]), snapshot(pool)
    want = restored(pool, before, repack.repack_pages, *arguments)
    got = restored(pool, before, repack_triton.repack_pages, *arguments)
    assert not torch.equal(want[0], before[0])
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("stored", STORED)
def test_pages_are_copied_to_heads_of_different_lengths(stored):
    from fastcache.compression import base, repack, repack_heads_triton
    from fastcache.kvcache.head_layout import HeadLayout, HeadRows, upload_layouts

    rng, pool = np.random.default_rng(1), filled(stored)
    layouts = [HeadLayout(rng.integers(1, n, (LAYERS, HEADS)), PAGE) for n in (900, 10, 500)]
    every = tables([-(-n // PAGE) for n in LENGTHS] + [layout.pages(0) for layout in layouts])
    packed, lengths = upload_layouts(layouts, CUDA), torch.tensor(LENGTHS, device=CUDA)
    for layer in range(LAYERS):
        heads, before = HeadRows(packed, layer, HEADS), snapshot(pool)
        kept = base.select(torch.randn(3, HEADS, 1000, device=CUDA), lengths, heads.kept)
        arguments = heads, every[:3], kept, every[3:]
        want = restored(pool, before, repack.repack_heads_pages, *arguments)
        got = restored(pool, before, repack_heads_triton.repack_heads_pages, *arguments)
        assert not torch.equal(want[0], before[0])
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["streaming_llm", "knorm", "keydiff", "random", "snapkv", "tova"])
@pytest.mark.parametrize("heads", [8, 24, 32])
def test_pages_give_what_the_step_s_own_tensors_give(name, heads):
    """In bfloat16, the same numbers side by side and out of pages. Kept entries are told apart by their sums."""
    import dataclasses

    from fastcache.compression.cost_inputs import StepInputs, StepShape
    from fastcache.compression.registry import create
    from fastcache.config import CompressionConfig

    method = create(CompressionConfig(method=name))
    shape = StepShape(LAYERS, heads, HEADS, SIZE, torch.bfloat16, context=1003, sequences=3, ratio=0.8)
    kept = []
    for paged in (False, True):
        inputs = StepInputs(method, dataclasses.replace(shape, paged=paged), CUDA)
        inputs.layer(1)
        kept.append(
            torch.stack(inputs._layers.pool.gather(1, inputs._work.fresh, shape.kept(method)))
            .double()
            .sum(-1)
        )
    assert kept[0].any()
    for got, want in zip(*(each.flatten(0, 2) for each in kept), strict=True):
        assert torch.isin(got, want).double().mean() >= 0.99


def test_what_pages_take_beside_the_pool_is_one_copy_of_the_keys():
    from fastcache.compression.cost import measure
    from fastcache.compression.cost_inputs import StepShape
    from fastcache.compression.registry import create
    from fastcache.config import CompressionConfig
    from fastcache.device.ceilings import Ceilings

    shape = StepShape(2, 32, HEADS, SIZE, torch.bfloat16, context=3968, sequences=8, ratio=0.8, paged=True)
    copy = shape.num_tokens * HEADS * SIZE * 2
    found = measure(create(CompressionConfig(method="snapkv")), shape, CUDA, Ceilings(3e12, 7e14, "bfloat16"))
    assert found.step_seconds > 0 and found.cost.extra_bytes <= copy + 32 * 2**20
