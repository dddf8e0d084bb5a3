"""KNorm: keys of small norm are the ones that get attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV


@dataclass(frozen=True, kw_only=True)
class KNorm(EvictionMethod):
    """Keep the entries whose key has the smallest L2 norm.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", EMNLP 2024,
    arXiv:2406.11430.

    In the first layer a key's norm depends on its token alone, so the occurrences of a repeated token tie up to
    rounding there.
    """

    name: ClassVar[str] = "knorm"

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32. In float32 even for bfloat16 keys, where most norms would tie."""
        return -torch.linalg.vector_norm(kv.keys, dim=-1, dtype=torch.float32)
