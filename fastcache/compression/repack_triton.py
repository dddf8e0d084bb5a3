"""`repack.repack_packed` and `repack_pages` as one Triton kernel: a few kept entries of one head per program, keys and
values together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.kvcache.gather_triton import stored_rows
from fastcache.kvcache.pool import KVPool, as_bytes

ENTRIES = 32


@triton.jit(do_not_specialize=["max_budget", "table_width", "fresh_width"])
def _repack_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    starts_ptr,
    table_ptr,
    kept_ptr,
    fresh_ptr,
    k_token,
    k_head,
    v_token,
    v_head,
    heads,
    max_budget,
    table_width,
    fresh_width,
    page_size,
    PAGED: tl.constexpr,
    LARGEST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    slot = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    position = tl.load(kept_ptr + row * max_budget + slot, mask=slot < max_budget, other=-1)
    real = position >= 0
    if PAGED:
        source = stored_rows(table_ptr + batch * table_width, position, real, head, heads, page_size)
        k_source, v_source = source * DIM, source * DIM
    else:
        token = tl.load(starts_ptr + batch) + position
        k_source, v_source = token * k_token + head * k_head, token * v_token + head * v_head
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < DIM)[None, :]
    k = tl.load(k_ptr + k_source[:, None] + column[None, :], mask=inside)
    v = tl.load(v_ptr + v_source[:, None] + column[None, :], mask=inside)
    if LARGEST > 0:
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    k, v = k.to(keys_ptr.dtype.element_ty), v.to(values_ptr.dtype.element_ty)
    target = stored_rows(fresh_ptr + batch * fresh_width, slot, real, head, heads, page_size)
    target = (target * DIM)[:, None] + column[None, :]
    tl.store(keys_ptr + target, k, mask=inside)
    tl.store(values_ptr + target, v, mask=inside)


def repack_packed(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, starts: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """keys, values: one layer's pages (P, Hk, page_size, d). The others as in `repack.repack_packed`."""
    largest = torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else 0.0
    _launch(keys, values, k, v, starts, None, kept, fresh_table, largest)


def repack_pages(pool: KVPool, layer: int, table: Tensor, kept: Tensor, fresh_table: Tensor) -> None:
    """As `repack.repack_pages`."""
    keys, values = as_bytes(pool.keys[layer]), as_bytes(pool.values[layer])
    _launch(keys, values, keys, values, None, table, kept, fresh_table, 0.0)


def _launch(
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    table: Tensor | None,
    kept: Tensor,
    fresh_table: Tensor,
    largest: float,
) -> None:
    """Either from rows of k and v that begin at `starts`, or from the pages that `table` names."""
    _, heads, page_size, dim = keys.shape
    paged, kept, fresh_table = table is not None, kept.contiguous(), fresh_table.contiguous()
    batch, _, max_budget = kept.shape
    assert not paged or table.stride(1) == 1
    _repack_kernel[(batch * heads, triton.cdiv(max_budget, ENTRIES))](
        k,
        v,
        keys,
        values,
        starts,
        table,
        kept,
        fresh_table,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        heads,
        max_budget,
        table.stride(0) if paged else 0,
        fresh_table.shape[1],
        page_size,
        PAGED=paged,
        LARGEST=largest,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ENTRIES=ENTRIES,
        num_warps=4,
    )
