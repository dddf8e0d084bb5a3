"""The only code that moves KV: kept entries of one layer go to fresh pages that one sequence alone owns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.kvcache.head_layout import HeadRows, entry_rows, plain_rows
from fastcache.kvcache.pages import SCRATCH_PAGE
from fastcache.kvcache.pool import KVPool


def repack_packed(
    pool: KVPool, layer: int, k: Tensor, v: Tensor, starts: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """As `repack_pages`, from a step's packed entries: k, v (T, Hk, d); sequence b begins at row starts[b]."""
    rows = (starts[:, None, None] + kept.clamp(min=0)).flatten(1)
    heads = torch.arange(kept.shape[1], device=kept.device)[:, None].expand(kept.shape[1:]).flatten()
    room = fresh_table.shape[1] * pool.page_size
    keys, values = (
        F.pad(x[rows, heads].unflatten(1, kept.shape[1:]), (0, 0, 0, room - kept.shape[2])) for x in (k, v)
    )
    pool.write_kept(layer, keys, values, fresh_table)


def repack_pages(pool: KVPool, layer: int, table: Tensor, kept: Tensor, fresh_table: Tensor) -> None:
    """Copy the kept entries of B sequences from their pages to fresh ones, in ascending order of position.

    table: (B, pages) int32, the sequences' own. kept: (B, Hk, K) int64 positions, -1 behind a sequence's budget.
    fresh_table: (B, ceil(K / page_size)) int32, the scratch page where a sequence needs fewer pages.
    """
    entries = torch.arange(kept.shape[2], device=kept.device).expand(kept.shape)
    target = plain_rows(pool, layer, fresh_table, entries)
    _copy(pool, layer, table, kept, target)


def repack_heads_pages(
    pool: KVPool, heads: HeadRows, table: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """As `repack_pages`, for KV heads that keep different numbers of entries (see `repack_heads`)."""
    entries = torch.arange(kept.shape[2], device=kept.device)[None, None]
    _copy(pool, heads.layer, table, kept, entry_rows(pool, heads, fresh_table, entries))


def _copy(pool: KVPool, layer: int, table: Tensor, kept: Tensor, target: Tensor) -> None:
    source = plain_rows(pool, layer, table, kept.clamp(min=0))
    pool.copy_rows(source, target.where(kept >= 0, SCRATCH_PAGE))  # its first row belongs to nobody


def repack_heads(
    pool: KVPool, heads: HeadRows, keys: Tensor, values: Tensor, kept: Tensor, fresh_table: Tensor
) -> None:
    """Kept entries of KV heads that keep different numbers of them: each head's go to units of its own.

    heads: this layer's part of the n layouts. keys, values: (n, Hk, T, d). kept: (n, Hk, K), -1 behind a head's
    budget. fresh_table: (n, pages).
    """
    entries = torch.arange(kept.shape[2], device=kept.device)[None, None]
    rows = entry_rows(pool, heads, fresh_table, entries).where(kept >= 0, SCRATCH_PAGE)
    index = kept.clamp(min=0).unsqueeze(3).expand(-1, -1, -1, keys.shape[3])
    pool.write_rows(rows, torch.gather(keys, 2, index), torch.gather(values, 2, index))
