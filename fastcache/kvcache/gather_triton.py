"""`pool.gather_pages` as one Triton kernel: each entry is read once and written once, cast on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 64


@triton.jit
def stored_rows(table, entry, inside, head, heads, page_size):
    """Rows of one layer's pages, read as (-1, d), that hold entries of one head. table: the sequence's pages."""
    page = tl.load(table + entry // page_size, mask=inside, other=0).to(tl.int64)
    return (page * heads + head) * page_size + entry % page_size


@triton.jit(do_not_specialize=["table_width", "length"])
def _gather_kernel(
    pages_ptr,
    table_ptr,
    out_ptr,
    heads,
    table_width,
    length,
    page_size,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    real = entry < length
    row = stored_rows(table_ptr + pair // heads * table_width, entry, real, pair % heads, heads, page_size)
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < DIM)[None, :]
    x = tl.load(pages_ptr + (row * DIM)[:, None] + column[None, :], mask=inside)
    out = out_ptr + ((pair * length + entry) * DIM)[:, None] + column[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=inside)


def gather_pages(pages: Tensor, page_table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """As `pool.gather_pages`; any table of integers whose rows lie side by side."""
    _, heads, page_size, dim = pages.shape
    batch, width = page_table.shape
    assert page_table.stride(1) == 1 and width * page_size >= length
    out = torch.empty((batch, heads, length, dim), dtype=dtype, device=pages.device)
    _gather_kernel[(batch * heads, triton.cdiv(length, ENTRIES))](
        pages,
        page_table,
        out,
        heads,
        page_table.stride(0),
        length,
        page_size,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ENTRIES=ENTRIES,
        num_warps=4,
    )
    return out
