"""AdaKV: the heads of a layer share one budget, and the scores decide who gets how much of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What `head_budgets` may say instead of a file: who competes for the entries that are kept.
ADAKV, GLOBAL = "adakv", "global"
SAFEGUARD = 0.2  # share of an equal budget that each head keeps in any case


def safe_count(budget: int) -> int:
    """Entries that each head of a layer keeps whatever the others score."""
    return max(1, int(budget * SAFEGUARD))


def adaptive_counts(
    scores: Tensor, lengths: Tensor, budgets: Tensor, largest: int, select: Callable[..., Tensor]
) -> Tensor:
    """(B, Hk) int64: how many entries each head keeps when a layer keeps its Hk x budget best.

    Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", arXiv:2407.11550, as kvpress has
    it: the best fifth of an equal budget is safe in each head, the rest goes to the highest scores of the layer. Scores
    must be comparable across heads.

    scores: (B, Hk, T) float32, -inf on padding. lengths, budgets: (B,) int64, of an equal distribution. largest: the
    largest budget, as the host knows it. select: as `base.select`.
    """
    batch, heads, padded = scores.shape
    safe = (budgets.double() * SAFEGUARD).long().clamp(min=1)
    best = select(scores, lengths, safe, safe_count(largest))
    mask = torch.zeros((batch, heads, padded + 1), dtype=torch.bool, device=scores.device)
    mask.scatter_(-1, best.where(best >= 0, padded), True)
    flat = scores.masked_fill(mask[..., :padded], torch.inf).flatten(1)[:, None]
    every = torch.full_like(lengths, heads * padded)
    kept = select(flat, every, budgets * heads, largest * heads)[:, 0]
    head = torch.div(kept, padded, rounding_mode="floor").where(kept >= 0, heads)
    counts = torch.zeros((batch, heads + 1), dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(1, head, torch.ones_like(head))[:, :heads]


def global_counts(scores: Tensor, total: int, n_sink: int) -> Tensor:
    """(layers, kv_heads) int64: how many entries each head keeps of the `total` highest scores of one context.

    scores: (layers, kv_heads, N). The first n_sink entries stay, as in KVzip (arXiv:2505.23416).
    """
    scores = scores.clone()
    scores[..., :n_sink] = torch.inf
    order = scores.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(scores.numel(), dtype=torch.int64, device=scores.device)
    return kept.index_fill_(0, order[:total], 1).view(scores.shape).sum(-1)
