"""The reference backend: gather each sequence's pages, pad, and call torch's scaled_dot_product_attention.

Works on any device and is the oracle of the fast backends. Like them, prompts that start in a step attend their own
keys and values as the model computed them; what was stored before is read back from the pool, which may hold fewer
bits. Query heads that share a KV head are laid side by side as extra queries, so keys and values are never repeated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.attention.base import AttentionBackend, page_readers, split_mixed
from fastcache.core import ForwardBatch


@dataclass(frozen=True)
class _Part:
    """Sequences that are padded to each other. B of them; real queries are flattened to T."""

    page_table: Tensor  # (B, max_pages)
    rows: Tensor  # (B, max_q) rows of the step's packed queries
    flat: Tensor  # (T,) which of B * max_q are real
    mask: Tensor  # (B, 1, group * max_q, max_kv)
    max_kv: int
    own: bool  # every sequence starts in this step, so it attends the step's own keys and values


class TorchSDPA(AttentionBackend):
    name = "torch-sdpa"

    def plan(self, batch: ForwardBatch) -> None:
        host, b = batch.host, batch.host.num_seqs
        # Single tokens padded to the length of a prompt would cost as much as a prompt each.
        prefills = 0 if host.decode else b - host.decode_rows
        readers = page_readers(split_mixed(host)[0] if host.decode_rows else host) if prefills else 0
        cuts = sorted({0, readers, prefills, b})
        self._parts = [
            self._part(batch, slice(start, end), own=readers <= start < prefills)
            for start, end in itertools.pairwise(cuts)
        ]

    def _part(self, batch: ForwardBatch, seqs: slice, own: bool) -> _Part:
        starts, kv_lens = batch.cu_seqlens_q[:-1][seqs], batch.kv_lens[seqs]
        q_lens = batch.cu_seqlens_q[1:][seqs] - starts
        on_host = np.diff(batch.host.cu_seqlens_q)[seqs]
        max_q = int(on_host.max())
        max_kv = int(batch.host.kv_lens[seqs].max())
        query = torch.arange(max_q, device=starts.device)
        entry = torch.arange(max_kv, device=starts.device)
        # Rows past a sequence's last query repeat row 0; they are computed and dropped.
        real = query < q_lens[:, None]  # (B, max_q)
        rows = torch.where(real, starts[:, None] + query, 0)
        # Told from the host: if the device were asked, the launch would wait for all that its stream has to do.
        flat = torch.from_numpy(np.flatnonzero(np.arange(max_q) < on_host[:, None]))
        last = (kv_lens - q_lens)[:, None] + query  # last entry each query may see
        last = torch.minimum(last, kv_lens[:, None] - 1)
        mask = (entry <= last[:, :, None])[:, None]  # (B, 1, max_q, max_kv)
        return _Part(
            batch.page_table[seqs],
            rows,
            flat.to(starts.device, non_blocking=True),
            mask.repeat(1, 1, self.heads.group, 1),
            max_kv,
            own,
        )

    def _write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        torch.cat([self._attend(part, layer, q, k, v) for part in self._parts], out=out)

    def _attend(self, part: _Part, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h, (b, n) = self.heads, part.rows.shape
        if part.own:
            keys, values = (x[part.rows].transpose(1, 2) for x in (k, v))
        else:
            keys, values = self.pool.gather(layer, part.page_table, part.max_kv)
        padded = q[part.rows].view(b, n, h.kv_heads, h.group, h.head_dim)
        padded = padded.permute(0, 2, 3, 1, 4).reshape(b, h.kv_heads, h.group * n, h.head_dim)
        out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=part.mask, scale=self.scale)
        out = out.view(b, h.kv_heads, h.group, n, h.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(b * n, h.num_heads, h.head_dim)[part.flat]
