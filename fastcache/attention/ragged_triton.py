"""Single-head rows in Triton: storing and attending entries whose place is arithmetic on each head's static lengths.

Nothing is planned per layer and all inputs stay on the device, so a decode step can be captured as a graph whatever
the lengths. Long heads are cut into splits that are attended apart and joined (flash decoding, as in arXiv:2311.01282).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.attention.base import AttentionBackend
from fastcache.attention.ragged import RaggedAttention, Rows
from fastcache.core import HostBatch
from fastcache.kvcache.head_layout import LayoutTable
from fastcache.kvcache.head_layout_triton import pool_rows

BLOCK = 64  # entries attended at once
SPLIT_ENTRIES, MAX_SPLITS = 512, 16
LOG2_E = 1.4426950408889634


@triton.jit
def _store_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    layouts_ptr,
    seats_ptr,
    appended_ptr,
    tables_ptr,
    k_stride,
    v_stride,
    table_stride,
    layer,
    pages,
    LARGEST: tl.constexpr,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    layout = layouts_ptr + tl.load(seats_ptr + token) * (3 * LAYERS * KV_HEADS + 1)
    column = tl.arange(0, WIDTH)
    inside = column < KV_HEADS * DIM
    head = layer * KV_HEADS + tl.minimum(column // DIM, KV_HEADS - 1)
    entry = tl.load(layout + head) + tl.load(appended_ptr + token).to(tl.int32)
    table = tables_ptr + token * table_stride
    row = pool_rows(layout, table, head, entry, inside, pages, LAYERS, KV_HEADS, PAGE)
    k = tl.load(k_ptr + token * k_stride + column, mask=inside)
    v = tl.load(v_ptr + token * v_stride + column, mask=inside)
    if LARGEST > 0:
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    target = row * DIM + column % DIM
    tl.store(keys_ptr + target, k.to(keys_ptr.dtype.element_ty), mask=inside)
    tl.store(values_ptr + target, v.to(values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    layouts_ptr,
    seats_ptr,
    appended_ptr,
    tables_ptr,
    sums_ptr,
    peaks_ptr,
    totals_ptr,
    scale,
    q_stride,
    table_stride,
    layer,
    pages,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One split of one KV head of one query token; its GROUP queries are the rows of a tile padded to ROWS."""
    token, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    layout = layouts_ptr + tl.load(seats_ptr + token) * (3 * LAYERS * KV_HEADS + 1)
    head = layer * KV_HEADS + kv_head
    table = tables_ptr + token * table_stride
    length = tl.load(layout + head) + tl.load(appended_ptr + token).to(tl.int32) + 1
    share = tl.maximum(SPLIT, tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK)
    begin = split * share
    end = tl.minimum(length, begin + share)
    group, within = tl.arange(0, ROWS), tl.arange(0, DIM)
    real = group < GROUP
    query = kv_head * GROUP + group
    q = tl.load(q_ptr + token * q_stride + query[:, None] * DIM + within[None], mask=real[:, None], other=0.0)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < end
        row = pool_rows(layout, table, head, entry, inside, pages, LAYERS, KV_HEADS, PAGE)
        where = row[:, None] * DIM + within[None]
        k = tl.load(keys_ptr + where, mask=inside[:, None], other=0.0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(inside[None], logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(peak - higher)
        v = tl.load(values_ptr + where, mask=inside[:, None], other=0.0).to(q.dtype)
        summed = summed * fade[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        peak = higher
    place = (token * KV_HEADS * GROUP + query) * SPLITS + split
    tl.store(peaks_ptr + place, peak, mask=real)
    tl.store(totals_ptr + place, total, mask=real)
    tl.store(sums_ptr + place[:, None] * DIM + within[None], summed, mask=real[:, None])


@triton.jit
def _join_kernel(
    sums_ptr, peaks_ptr, totals_ptr, out_ptr, DIM: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr
):
    """The splits of one query head of one token; the first split is never empty."""
    row = tl.program_id(0).to(tl.int64)
    split, within = tl.arange(0, WIDTH), tl.arange(0, DIM)
    real = split < SPLITS
    peak = tl.load(peaks_ptr + row * SPLITS + split, mask=real, other=-float("inf"))
    weight = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(weight * tl.load(totals_ptr + row * SPLITS + split, mask=real, other=0.0), 0)
    where = (row * SPLITS + split)[:, None] * DIM + within[None]
    summed = tl.load(sums_ptr + where, mask=real[:, None], other=0.0)
    out = tl.sum(weight[:, None] * summed, 0) / total
    tl.store(out_ptr + row * DIM + within, out.to(out_ptr.dtype.element_ty))


class RaggedTriton(RaggedAttention):
    """max_rows: query tokens of the largest captured step. max_pages: columns of a page table."""

    supports_graphs = True

    def __init__(self, dense: AttentionBackend, layouts: LayoutTable, max_rows: int, max_pages: int) -> None:
        super().__init__(dense, layouts)
        self.name = f"{dense.name}+ragged-triton"
        device = self.pool.device
        self._numbers = torch.zeros((2, max_rows), dtype=torch.int64, device=device)
        self._tables = torch.zeros((max_rows, max_pages), dtype=torch.int32, device=device)

    def plan_graph(self, host: HostBatch) -> None:
        """All inputs are written into buffers that a captured graph reads."""
        self.layouts.sync(host.seats, host.layouts)
        size, width = host.page_table.shape
        appended = host.kv_lens - 1 - self.layouts.longest[host.seats]
        numbers = torch.from_numpy(np.stack((host.seats, appended))).pin_memory()
        self._numbers[:, :size].copy_(numbers, non_blocking=True)
        table = torch.from_numpy(np.ascontiguousarray(host.page_table)).pin_memory()
        self._tables[:size, :width].copy_(table, non_blocking=True)
        longest = self._tables.shape[1] * self.pool.page_size
        self._rows = Rows(self._numbers[0, :size], self._numbers[1, :size], self._tables[:size], longest)
        self._apart = None

    def _sizes(self) -> dict[str, int]:
        shape = self.pool.shape
        return {
            "LAYERS": shape.num_layers,
            "KV_HEADS": shape.kv_heads,
            "PAGE": self.pool.page_size,
            "DIM": shape.head_dim,
        }

    def _store(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
        pool = self.pool
        _store_kernel[(len(k),)](
            k,
            v,
            pool.keys,
            pool.values,
            self.layouts.packed,
            rows.seats,
            rows.appended,
            rows.page_tables,
            k.stride(0),
            v.stride(0),
            rows.page_tables.stride(0),
            layer,
            pool.num_pages,
            LARGEST=torch.finfo(pool.keys.dtype).max if pool.keys.dtype.itemsize == 1 else 0.0,
            WIDTH=triton.next_power_of_2(k.shape[1] * k.shape[2]),
            **self._sizes(),
        )

    def _attend(self, layer: int, q: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
        pool, h, n = self.pool, self.heads, len(q)
        splits = min(MAX_SPLITS, triton.cdiv(rows.max_len, SPLIT_ENTRIES))
        sums = torch.empty((n, h.num_heads, splits, h.head_dim), dtype=torch.float32, device=q.device)
        peaks, totals = torch.empty((2, n, h.num_heads, splits), dtype=torch.float32, device=q.device)
        _attend_kernel[(n, h.kv_heads, splits)](
            q,
            pool.keys,
            pool.values,
            self.layouts.packed,
            rows.seats,
            rows.appended,
            rows.page_tables,
            sums,
            peaks,
            totals,
            self.scale * LOG2_E,
            q.stride(0),
            rows.page_tables.stride(0),
            layer,
            pool.num_pages,
            GROUP=h.group,
            ROWS=max(16, triton.next_power_of_2(h.group)),
            BLOCK=BLOCK,
            SPLIT=SPLIT_ENTRIES,
            SPLITS=splits,
            num_stages=2 if q.dtype.itemsize == 4 else 3,  # shared memory
            **self._sizes(),
        )
        out = q.new_empty(q.shape) if out is None else out
        _join_kernel[(n * h.num_heads,)](
            sums,
            peaks,
            totals,
            out,
            DIM=h.head_dim,
            SPLITS=splits,
            WIDTH=triton.next_power_of_2(splits),
        )
        return out
