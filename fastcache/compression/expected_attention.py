"""Expected attention: what queries that are yet to come will attend to, judged by those of the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, whole_number
from fastcache.config import require


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(EvictionMethod):
    """Model a head's unrotated queries as a Gaussian, rotate it to the positions after the prompt, and keep the
    entries with the largest expected attention weight times value norm.

    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", arXiv:2510.00636.

    n_sink: first entries that stay, and whose queries, being outliers, are left out of the statistics.
    n_future: positions after the prompt over which the rotation is averaged.
    epsilon: added to the expected weight before the value norm multiplies it; the more, the more the value
        counts. 0 is the default of kvpress's class; its leaderboard runs 1e-2, here `expected_attention_eps`.
    """

    name: ClassVar[str] = "expected_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "query_stats"})

    n_sink: int = 4
    n_future: int = 512
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("n_future", self.n_future, minimum=1)
        number = isinstance(self.epsilon, int | float) and not isinstance(self.epsilon, bool)
        require(
            number and math.isfinite(self.epsilon) and self.epsilon >= 0,
            f"epsilon is {self.epsilon!r}; allowed is a number of at least 0.",
        )

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: (softmax of the expected logit, averaged over G, + epsilon) x value norm."""
        keys = kv.keys.float()
        mean, cov = self._future_queries(kv)
        logits = mean.unflatten(1, (keys.shape[1], -1)) @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
        # One query head of each group at a time: all G at once would need G x T x d floats per KV head.
        groups = cov.unflatten(1, (keys.shape[1], -1)).unbind(2)
        spread = torch.stack([((keys @ group) * keys).sum(-1) for group in groups], dim=2)
        return self.weigh((logits + spread / (2 * keys.shape[-1])).flatten(1, 2), kv)

    def weigh(self, logits: Tensor, kv: LayerKV) -> Tensor:
        """(B, Hk, T) from the expected logits (B, H, T)."""
        logits = logits.unflatten(1, (kv.keys.shape[1], -1))
        candidates = kv.valid & (kv.positions >= self.n_sink)
        weights = logits.masked_fill(~candidates[:, :, None], -torch.inf).softmax(-1).mean(2)
        return (weights + self.epsilon) * torch.linalg.vector_norm(kv.values, dim=-1, dtype=torch.float32)

    def future_rotation(self, kv: LayerKV) -> tuple[Tensor, Tensor]:
        """Mean cosine and sine, each (B, 1, d / 2), over the positions that are to come."""
        future = kv.lengths[:, None] + torch.arange(self.n_future, device=kv.lengths.device)
        angles = future[:, None, :, None] * kv.inv_freq
        return angles.cos().mean(2), angles.sin().mean(2)

    def _future_queries(self, kv: LayerKV) -> tuple[Tensor, Tensor]:
        """Mean (B, H, d) and covariance (B, H, d, d) of the queries under R, the mean rotation over positions
        N, ..., N + n_future - 1 of each sequence: R mu and R C R^T."""
        cos, sin = self.future_rotation(kv)
        half_rotated = _rotate(kv.query_cov, cos[:, :, None], sin[:, :, None])
        cov = _rotate(half_rotated.transpose(-1, -2), cos[:, :, None], sin[:, :, None])
        return _rotate(kv.query_mean, cos, sin), cov


@dataclass(frozen=True, kw_only=True)
class ExpectedAttentionEps(ExpectedAttention):
    """`ExpectedAttention` (arXiv:2510.00636) with the epsilon of kvpress's leaderboard, without its AdaKV."""

    name: ClassVar[str] = "expected_attention_eps"

    epsilon: float = 1e-2


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding along the last dimension, its halves paired as Llama and Qwen pair them."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
