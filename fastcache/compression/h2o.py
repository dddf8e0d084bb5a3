"""H2O: heavy hitters of attention, and the most recent entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV
from fastcache.config import require


@dataclass(frozen=True, kw_only=True)
class H2O(EvictionMethod):
    """Spend a share of the budget on the latest entries, the rest on those with the most attention mass.

    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    NeurIPS 2023, arXiv:2306.14048: accumulated attention, un-normalised, with half of the budget recent. The
    paper evicts one entry for each new token; here the rule is applied once, after the prefill, and the query
    heads of a group are averaged. kvpress has no such method: its `observed_attention` is normalised and keeps
    no recent window.

    recent: share of the budget, rounded down, that the latest entries get.
    """

    name: ClassVar[str] = "h2o"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_mass"})

    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.recent, int | float) and not isinstance(self.recent, bool)
        require(number and 0 <= self.recent < 1, f"recent is {self.recent!r}; allowed is a number in [0, 1).")

    def protected_recent(self, budgets: Tensor) -> Tensor:
        """`recent` of each budget, rounded down; in float64, so that the CPU and the GPU round alike."""
        return (budgets.double() * self.recent).long()

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: attention mass, averaged over the query heads of a group."""
        return kv.attention_mass.unflatten(1, (kv.keys.shape[1], -1)).mean(2)
