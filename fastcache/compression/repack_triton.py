"""`repack.repack_packed` as one Triton kernel: a few kept entries of one head per program, keys and values together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 32


@triton.jit
def _repack_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    starts_ptr,
    kept_ptr,
    fresh_ptr,
    k_token,
    k_head,
    v_token,
    v_head,
    heads,
    max_budget,
    table_width,
    page_size,
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
    token = tl.load(starts_ptr + batch) + position
    page = tl.load(fresh_ptr + batch * table_width + slot // page_size, mask=real, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < DIM)[None, :]
    k = tl.load(k_ptr + (token * k_token + head * k_head)[:, None] + column[None, :], mask=inside)
    v = tl.load(v_ptr + (token * v_token + head * v_head)[:, None] + column[None, :], mask=inside)
    if LARGEST > 0:
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    k, v = k.to(keys_ptr.dtype.element_ty), v.to(values_ptr.dtype.element_ty)
    target = (((page * heads + head) * page_size + slot % page_size) * DIM)[:, None] + column[None, :]
    tl.store(keys_ptr + target, k, mask=inside)
    tl.store(values_ptr + target, v, mask=inside)


def repack_packed(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, starts: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """keys, values: one layer's pages (P, Hk, page_size, d). The others as in `repack.repack_packed`."""
    _, heads, page_size, dim = keys.shape
    kept, fresh_table = kept.contiguous(), fresh_table.contiguous()
    batch, _, max_budget = kept.shape
    _repack_kernel[(batch * heads, triton.cdiv(max_budget, ENTRIES))](
        k,
        v,
        keys,
        values,
        starts,
        kept,
        fresh_table,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        heads,
        max_budget,
        fresh_table.shape[1],
        page_size,
        LARGEST=torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else 0.0,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ENTRIES=ENTRIES,
        num_warps=4,
    )
