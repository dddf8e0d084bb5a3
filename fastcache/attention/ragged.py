"""Attention over caches whose KV heads hold different numbers of entries (`kvcache.head_layout`).

Prompts that are not compressed yet are left to the plain backend. Every other query token is a row of its own with
one length per KV head: a decoded token, or each token of a question behind a compressed context.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.attention.base import AttentionBackend
from fastcache.core import ForwardBatch, HostBatch
from fastcache.kvcache.head_layout import HeadRows, LayoutTable, entry_rows
from fastcache.kvcache.pool import KVPlace


@dataclass(frozen=True)
class Rows:
    """n query tokens on the device. seats, appended: (n,) int64; appended counts the entries stored since
    compression before this token's own. page_tables: (n, max_pages) int32. max_len: no head holds more."""

    seats: Tensor
    appended: Tensor
    page_tables: Tensor
    max_len: int

    def pick(self, which: Tensor) -> Rows:
        return Rows(self.seats[which], self.appended[which], self.page_tables[which], self.max_len)

    @cached_property
    def by_sequence(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Rows of a sequence follow each other and read the same entries. The first row of each of B sequences (B,),
        each row's sequence (n,) and its place there (n,), and the most rows of one."""
        _, sequence, counts = self.seats.unique_consecutive(return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(sequence), device=sequence.device) - first[sequence]
        return first, sequence, place, int(counts.max())


class RaggedAttention(AttentionBackend):
    """A plain backend for what is not compressed, and rows of single heads for the rest; the reference of the
    kernels in `ragged_triton`."""

    def __init__(self, dense: AttentionBackend, layouts: LayoutTable) -> None:
        super().__init__(dense.pool, dense.heads)
        self.dense, self.layouts = dense, layouts
        self.name = f"{dense.name}+ragged"
        self._rows: Rows | None = None  # all tokens of the step, if any of them needs its head's layout
        # Tokens for the plain backend, the others, and the rows of the others.
        self._apart: tuple[Tensor, Tensor, Rows] | None = None

    @property
    def lse(self) -> Tensor | None:
        """Rows of the plain backend are rows of the step only if it serves all of them."""
        return self.dense.lse if self._rows is None else None

    def plan(self, batch: ForwardBatch) -> None:
        host = batch.host
        self.layouts.sync(host.seats, host.layouts)
        ragged = self.layouts.ragged[host.seats]
        self._rows = self._apart = None
        if not ragged.any():
            self.dense.plan(batch)
            return
        self._rows = self._rows_of(host, batch)
        lengths = np.diff(host.cu_seqlens_q)
        plain = ~ragged & (lengths > 1)
        if plain.any():
            tokens = np.repeat(plain, lengths)
            self.dense.plan(_part(batch, plain, tokens))
            alone, others = (
                torch.from_numpy(np.flatnonzero(mask)).to(self.pool.device) for mask in (tokens, ~tokens)
            )
            self._apart = alone, others, self._rows.pick(others)

    def _rows_of(self, host: HostBatch, batch: ForwardBatch) -> Rows:
        lengths = np.diff(host.cu_seqlens_q)
        row = np.repeat(np.arange(host.num_seqs), lengths)
        within = np.arange(len(row)) - host.cu_seqlens_q[:-1][row]
        stored = (host.kv_lens - lengths)[row] + within - self.layouts.longest[host.seats[row]]
        numbers = torch.from_numpy(np.stack((host.seats[row], stored, row))).to(self.pool.device)
        return Rows(numbers[0], numbers[1], batch.page_table[numbers[2]], int(host.kv_lens.max()))

    def store(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        if self._rows is None:
            self.dense.store(layer, k, v, slot_mapping)
        else:
            self._store(layer, k, v, self._rows)

    def place(self, layer: int, slot_mapping: Tensor) -> KVPlace | None:
        return self.dense.place(layer, slot_mapping) if self._rows is None else None

    def _write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        if self._rows is None:
            self.dense.run(layer, q, k, v, out)
        elif self._apart is None:
            self._attend(layer, q, self._rows, out)
        else:
            plain, others, rows = self._apart
            out[plain] = self.dense.run(layer, q[plain], k[plain], v[plain])
            out[others] = self._attend(layer, q[others], rows)

    def _head_rows(self, layer: int, rows: Rows) -> HeadRows:
        return HeadRows(self.layouts.packed[rows.seats], layer, self.heads.kv_heads)

    def _store(self, layer: int, k: Tensor, v: Tensor, rows: Rows) -> None:
        heads = self._head_rows(layer, rows)
        entries = (heads.kept + rows.appended[:, None])[:, :, None]
        where = entry_rows(self.pool, heads, rows.page_tables, entries).squeeze(2)
        self.pool.write_rows(where, k, v)

    def _attend(self, layer: int, q: Tensor, rows: Rows, out: Tensor | None = None) -> Tensor:
        """q: (n, H, d), each with its own lengths. Returns (n, H, d), in `out` if it is given. Entries are read once
        for each sequence."""
        h, (first, sequence, place, most) = self.heads, rows.by_sequence
        shared = rows.pick(first)
        b, heads = len(first), self._head_rows(layer, shared)
        entries = torch.arange(rows.max_len, device=q.device)[None, None]
        keys, values = self.pool.read_rows(entry_rows(self.pool, heads, shared.page_tables, entries))
        padded, appended = q.new_zeros((b, most, *q.shape[1:])), rows.appended.new_zeros((b, most))
        padded[sequence, place], appended[sequence, place] = q, rows.appended
        padded = padded.view(b, most, h.kv_heads, h.group, h.head_dim).permute(0, 2, 3, 1, 4)
        mask = entries[:, :, None] <= (heads.kept[:, :, None] + appended[:, None])[..., None]
        mask = mask.repeat(1, 1, h.group, 1)  # (B, kv_heads, group * most, max_len)
        attended = F.scaled_dot_product_attention(
            padded.flatten(2, 3), keys, values, attn_mask=mask, scale=self.scale
        )
        attended = attended.unflatten(2, (h.group, most)).permute(0, 3, 1, 2, 4)[sequence, place]
        return attended.reshape(q.shape) if out is None else out.copy_(attended.reshape(q.shape))


def with_layouts(
    dense: AttentionBackend, layouts: LayoutTable, max_rows: int, max_pages: int
) -> RaggedAttention:
    """The kernels where Triton runs, else the reference. max_rows: most query tokens of a captured step."""
    if dense.pool.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from fastcache.attention.ragged_triton import RaggedTriton

        return RaggedTriton(dense, layouts, max_rows, max_pages)
    return RaggedAttention(dense, layouts)


def _part(batch: ForwardBatch, seqs: np.ndarray, tokens: np.ndarray) -> ForwardBatch:
    """The sequences and tokens of `batch` that two masks name: what a backend plans with, nothing to sample."""
    host, device = batch.host, batch.page_table.device
    cu_seqlens = np.concatenate(([0], np.cumsum(np.diff(host.cu_seqlens_q)[seqs])))
    part = dataclasses.replace(
        host,
        seats=host.seats[seqs],
        positions=host.positions[tokens],
        slots=host.slots[tokens],
        cu_seqlens_q=cu_seqlens,
        kv_lens=host.kv_lens[seqs],
        page_table=host.page_table[seqs],
        decode_rows=0,
    )
    chosen = torch.from_numpy(np.flatnonzero(seqs)).to(device)
    return dataclasses.replace(
        batch,
        host=part,
        cu_seqlens_q=torch.from_numpy(cu_seqlens).to(device),
        kv_lens=batch.kv_lens[chosen],
        page_table=batch.page_table[chosen],
    )
