"""`repack.repack_heads` as one Triton kernel: a few kept entries of one head per program, keys and values together.

Heads with small budgets end early: a program without kept entries reads one line of positions and stops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.kvcache.head_layout import HeadRows
from fastcache.kvcache.head_layout_triton import pool_rows
from fastcache.kvcache.pool import KVPool

ENTRIES = 32


@triton.jit
def _repack_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    layouts_ptr,
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
    layer,
    pages,
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
    table = fresh_ptr + batch * table_width
    head_of_all = layer * KV_HEADS + head
    target = pool_rows(layout, table, head_of_all, entry, real, pages, LAYERS, KV_HEADS, PAGE)
    column = tl.arange(0, DIM)
    inside = real[:, None] & (column >= 0)[None, :]
    k = tl.load(
        k_ptr + batch * k_batch + head * k_head + (position * k_entry)[:, None] + column[None, :], mask=inside
    )
    v = tl.load(
        v_ptr + batch * v_batch + head * v_head + (position * v_entry)[:, None] + column[None, :], mask=inside
    )
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
    shape, kept, fresh_table = pool.shape, kept.contiguous(), fresh_table.contiguous()
    batch, _, max_kept = kept.shape
    _repack_kernel[(batch * shape.kv_heads, triton.cdiv(max_kept, ENTRIES))](
        keys,
        values,
        pool.keys,
        pool.values,
        heads.packed,
        kept,
        fresh_table,
        *keys.stride()[:3],
        *values.stride()[:3],
        max_kept,
        fresh_table.shape[1],
        heads.layer,
        pool.num_pages,
        LARGEST=torch.finfo(pool.keys.dtype).max if pool.keys.dtype.itemsize == 1 else 0.0,
        LAYERS=shape.num_layers,
        KV_HEADS=shape.kv_heads,
        PAGE=pool.page_size,
        DIM=shape.head_dim,
        ENTRIES=ENTRIES,
        num_warps=4,
    )
