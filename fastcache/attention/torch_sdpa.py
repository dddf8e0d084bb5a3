"""The reference backend: gather each sequence's pages, pad, and call torch's scaled_dot_product_attention.

Works on any device and is the oracle of the fast backends. Like them, prompts that start in a step attend their own
keys and values as the model computed them; what was stored before is read back from the pool, which may hold fewer
bits. Query heads that share a KV head are laid side by
side as extra queries, so keys and values are never repeated.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.attention.base import AttentionBackend
from fastcache.core import ForwardBatch


class TorchSDPA(AttentionBackend):
    name = "torch-sdpa"

    def plan(self, batch: ForwardBatch) -> None:
        starts, kv_lens = batch.cu_seqlens_q[:-1], batch.kv_lens
        q_lens = batch.cu_seqlens_q[1:] - starts
        self._max_q = int(np.diff(batch.host.cu_seqlens_q).max())
        self._max_kv = int(batch.host.kv_lens.max())
        whole = bool((np.diff(batch.host.cu_seqlens_q) == batch.host.kv_lens).all())
        self._own = whole and not batch.host.decode
        self._page_table = batch.page_table
        query = torch.arange(self._max_q, device=starts.device)
        entry = torch.arange(self._max_kv, device=starts.device)
        # Rows past a sequence's last query repeat row 0; they are computed and dropped.
        real = query < q_lens[:, None]  # (B, max_q)
        self._rows = torch.where(real, starts[:, None] + query, 0)
        self._flat = real.flatten().nonzero().squeeze(1)
        last = (kv_lens - q_lens)[:, None] + query  # last entry each query may see
        last = torch.minimum(last, kv_lens[:, None] - 1)
        mask = entry <= last[:, :, None]  # (B, max_q, max_kv)
        self._mask = mask[:, None].repeat(1, 1, self.heads.group, 1)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        h, (b, n) = self.heads, self._rows.shape
        if self._own:
            keys, values = (x[self._rows].transpose(1, 2) for x in (k, v))
        else:
            keys, values = self.pool.gather(layer, self._page_table, self._max_kv)
        padded = q[self._rows].view(b, n, h.kv_heads, h.group, h.head_dim)
        padded = padded.permute(0, 2, 3, 1, 4).reshape(b, h.kv_heads, h.group * n, h.head_dim)
        out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=self._mask, scale=self.scale)
        out = out.view(b, h.kv_heads, h.group, n, h.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(b * n, h.num_heads, h.head_dim)[self._flat]
