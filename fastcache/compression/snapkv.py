"""SnapKV: what the last queries of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcache.compression.base import EvictionMethod, LayerKV, whole_number
from fastcache.compression.window import window_attention
from fastcache.config import require


@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictionMethod):
    """Keep the last `window` entries and those that their queries attend to, smoothed over `kernel` ones.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv:2404.14469.
    The query heads of a group are averaged, as in kvpress. Query-aware or query-agnostic is decided by the
    prompt: whether the question is part of it.

    window: last queries that vote, and last entries that stay.
    kernel: odd width of the average pooling, which counts zeros beyond both ends.

    Unlike kvpress, a budget below the window keeps its most recent entries; there any of them may stay.
    """

    name: ClassVar[str] = "snapkv"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "window_queries"})

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("window", self.window, minimum=1)
        whole_number("kernel", self.kernel, minimum=1)
        require(self.kernel % 2 == 1, f"kernel is {self.kernel}; allowed is an odd integer.")

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: mean attention of the window, zero inside it, pooled over neighbours."""
        weights = window_attention(kv)  # (B, H, w, T)
        grouped = weights.view(len(weights), kv.keys.shape[1], -1, weights.shape[-1])
        mean = grouped.mean(2, dtype=torch.float32)
        before_window = kv.positions < kv.lengths[:, None, None] - self.window
        mean = mean.masked_fill(~before_window, 0.0)
        return F.avg_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)
