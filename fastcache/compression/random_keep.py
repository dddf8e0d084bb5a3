"""Random eviction: the floor that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, whole_number


@dataclass(frozen=True, kw_only=True)
class RandomKeep(EvictionMethod):
    """Keep random entries, drawn for each layer, KV head and position from `seed`.

    A control, not a published method. Two differences from kvpress, on purpose. The first `n_sink` entries
    stay, because without attention sinks a model does worse than with no context at all, which measures the
    loss of four tokens rather than of a random half; `n_sink: 0` is kvpress's version. And each layer draws
    anew, where kvpress with a seed repeats one draw in all layers.

    A draw is a hash of (seed, layer, head, position), so a sequence keeps the same entries alone, in any
    batch and on any device. It also means that sequences of equal length keep the same positions.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[frozenset[str]] = frozenset()
    by_layer: ClassVar[bool] = True

    n_sink: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("seed", self.seed, minimum=0)

    def importance(self, kv: LayerKV) -> Tensor:
        """(1, Hk, T) float32, uniform on [0, 1) in steps of 2^-24."""
        heads = torch.arange(kv.keys.shape[1], device=kv.keys.device)
        layer = torch.full_like(heads, self.seed % 2**63)
        state = _mix(_mix(_mix(layer) + kv.layer) + heads)[:, None]
        return ((_mix(state + kv.positions) >> 8) & 0xFFFFFF).float()[None] / 2**24


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) in wrapping int64 arithmetic."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own `>>` on int64 copies the sign bit."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant
