"""The attention of a prompt's last queries, recomputed: fast kernels do not return their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcache.compression.base import LayerKV


def window_attention(kv: LayerKV) -> Tensor:
    """(B, H, w, T), model dtype: causal softmax of the last w queries over all keys, zero on padding.

    The softmax runs in float32 and is then rounded to the model's dtype, as kvpress does it.
    """
    queries, keys = kv.window_queries, kv.keys
    batch, heads, window, size = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], -1, size)
    logits = (grouped @ keys.transpose(-1, -2)).view(batch, heads, window, -1) * size**-0.5
    query_positions = kv.lengths[:, None] - window + torch.arange(window, device=keys.device)
    future = kv.positions > query_positions[:, None, :, None]
    weights = logits.masked_fill_(future, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(keys.dtype)
