"""The contract of a method that judges entries by hidden states: each is rated when its layer reads it.

A hidden state is as wide as the model, for every token and layer, so none is kept. What stays is one number per KV
head, beside the entry in its page: chunks, shared prefixes and later compression find it there.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV


@dataclass(frozen=True)
class StateFit:
    """The model whose hidden states are rated."""

    num_layers: int
    hidden_size: int
    kv_heads: int
    dtype: torch.dtype
    device: torch.device
    dummy_weights: bool = False


class StateRater(Protocol):
    """A method's weights on the device of one engine."""

    def rate(self, layer: int, hidden: Tensor) -> Tensor:
        """hidden: (T, n), what the attention of `layer` reads, model dtype. Returns (T, Hk) float32; higher stays."""
        ...

    def flops(self, num_tokens: int) -> float:
        """Floating-point operations of one layer over so many tokens; a multiply-add is two."""
        ...

    def describe(self) -> dict[str, Any]:
        """Which weights these are, for whoever reads a result."""
        ...


@dataclass(frozen=True, kw_only=True)
class StateMethod(EvictionMethod):
    """An eviction by the ratings of its `rater`."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    @abstractmethod
    def rater(self, fit: StateFit) -> StateRater:
        """Errors: `CheckpointError`, `ConfigError` where the method and the model do not go together."""

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: the ratings."""
        return kv.ratings
