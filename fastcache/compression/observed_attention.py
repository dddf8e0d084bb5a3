"""Observed attention: the mean attention an entry received during the prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(EvictionMethod):
    """Keep the entries with the highest attention per query that could see them.

    kvpress's relative of H2O (Zhang et al., arXiv:2306.14048): the attention mass of entry i is divided by the
    N - i queries behind it, so early entries have no head start, and no recent window is protected. The paper's
    own rule is the method `h2o`.
    """

    name: ClassVar[str] = "observed_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_mass"})

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: attention mass per query, averaged over the query heads of a group."""
        queries = (kv.lengths[:, None, None] - kv.positions).clamp(min=1)
        return (kv.attention_mass / queries).unflatten(1, (kv.keys.shape[1], -1)).mean(2)
