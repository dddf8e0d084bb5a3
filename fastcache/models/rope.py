"""The table of rotary angles. Su et al. 2021 (RoFormer); `llama3` is Meta's frequency-dependent scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcache.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) float32 angle per position of each rotated pair."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return freq / rope.parameters["factor"]
    if rope.kind == "llama3":
        return _llama3(freq, rope)
    return freq


def _llama3(freq: Tensor, rope: RopeConfig) -> Tensor:
    """Slow rotations are stretched by `factor`, fast ones kept, those between are interpolated."""
    p = rope.parameters
    wavelength = 2 * math.pi / freq
    turns = p["original_max_position_embeddings"] / wavelength
    blend = (turns - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
    blend = blend.clamp(0, 1)
    return (1 - blend) * freq / p["factor"] + blend * freq


def rotary_table(rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """(max_positions, 2, head_dim / 2) float32: cosine and sine of position * frequency."""
    angles = torch.outer(torch.arange(max_positions).float(), inverse_frequencies(rope, head_dim))
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)
