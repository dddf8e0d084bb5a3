"""`repack.repack_heads` and `repack_heads_pages` as one Triton kernel: a few kept entries of one head per program.

Heads with small budgets end early: a program without kept entries reads one line of positions and stops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.kvcache.gather_triton import stored_rows
from fastcache.kvcache.head_layout import HeadRows
from fastcache.kvcache.head_layout_triton import pool_rows
from fastcache.kvcache.pool import KVPool, as_bytes

ENTRIES = 32


@triton.jit(do_not_specialize=["max_kept", "table_width", "fresh_width"])
def _repack_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    layouts_ptr,
    table_ptr,
    kept_ptr,
    fresh_ptr,
    k_batch,
    k_head,
    k_entry,
    v_batch,
    v_head,
    v_entry,
    max_kept,
    table_width,
    fresh_width,
    layer,
    pages,
    PAGED: tl.constexpr,
    LARGEST: tl.constexpr,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // KV_HEADS, row % KV_HEADS
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    position = tl.load(kept_ptr + row * max_kept + entry, mask=entry < max_kept, other=-1)
    real = position >= 0
    layout = layouts_ptr + batch * (3 * LAYERS * KV_HEADS + 1)
    fresh = fresh_ptr + batch * fresh_width
    head_of_all = layer * KV_HEADS + head
    target = pool_rows(layout, fresh, head_of_all, entry, real, pages, LAYERS, KV_HEADS, PAGE)
    column = tl.arange(0, DIM)
    inside = real[:, None] & (column >= 0)[None, :]
    if PAGED:
        source = stored_rows(table_ptr + batch * table_width, position, real, head, KV_HEADS, PAGE)
        k_source, v_source = source * DIM, source * DIM
    else:
        k_source = batch * k_batch + head * k_head + position * k_entry
        v_source = batch * v_batch + head * v_head + position * v_entry
    k = tl.load(k_ptr + k_source[:, None] + column[None, :], mask=inside)
    v = tl.load(v_ptr + v_source[:, None] + column[None, :], mask=inside)
    if LARGEST > 0:
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    where = (target * DIM)[:, None] + column[None, :]
    tl.store(keys_ptr + where, k.to(keys_ptr.dtype.element_ty), mask=inside)
    tl.store(values_ptr + where, v.to(values_ptr.dtype.element_ty), mask=inside)


def repack_heads(
    pool: KVPool, heads: HeadRows, keys: Tensor, values: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """As `repack.repack_heads`; the head size is a power of two."""
    largest = torch.finfo(pool.keys.dtype).max if pool.keys.dtype.itemsize == 1 else 0.0
    _launch(pool.keys, pool.values, pool, heads, keys, values, None, kept, fresh_table, largest)


def repack_heads_pages(
    pool: KVPool, heads: HeadRows, table: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """As `repack.repack_heads_pages`; the head size is a power of two."""
    keys, values = as_bytes(pool.keys), as_bytes(pool.values)
    of_layer = keys[heads.layer], values[heads.layer]
    _launch(keys, values, pool, heads, *of_layer, table, kept, fresh_table, 0.0)


def _launch(
    pool_keys: Tensor,
    pool_values: Tensor,
    pool: KVPool,
    heads: HeadRows,
    keys: Tensor,
    values: Tensor,
    table: Tensor | None,
    kept: Tensor,
    fresh_table: Tensor,
    largest: float,
) -> None:
    """From keys and values (n, Hk, T, d), or out of the layer's pages where `table` names those of the n sequences."""
    shape, kept, fresh_table = pool.shape, kept.contiguous(), fresh_table.contiguous()
    batch, _, max_kept = kept.shape
    paged = table is not None
    assert not paged or table.stride(1) == 1
    _repack_kernel[(batch * shape.kv_heads, triton.cdiv(max_kept, ENTRIES))](
        keys,
        values,
        pool_keys,
        pool_values,
        heads.packed,
        table,
        kept,
        fresh_table,
        *keys.stride()[:3],
        *values.stride()[:3],
        max_kept,
        table.stride(0) if paged else 0,
        fresh_table.shape[1],
        heads.layer,
        pool.num_pages,
        PAGED=paged,
        LARGEST=largest,
        LAYERS=shape.num_layers,
        KV_HEADS=shape.kv_heads,
        PAGE=pool.page_size,
        DIM=shape.head_dim,
        ENTRIES=ENTRIES,
        num_warps=4,
    )
