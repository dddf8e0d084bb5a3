"""Merging written as its definition says: entry by entry, in float64, with torch's own Sequential."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcache.compression.merge import MergeLayout


def networks(
    factor: int, size: int, width: int, layers: int, kinds=("tk", "tv", "ik", "iv")
) -> nn.ModuleDict:
    """As the original builds them: one Sequential per layer, so the state dict has its names. Seeded, float64."""

    def one() -> nn.Sequential:
        return nn.Sequential(
            *(nn.Linear(factor * size, width), nn.ReLU(), nn.Dropout(0.4)),
            *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.4)),
            nn.Linear(width, size),
        )

    torch.manual_seed(0)
    nets = {f"compress_{kind}": nn.ModuleList(one() for _ in range(layers)) for kind in kinds}
    return nn.ModuleDict(nets).double().eval()


def turned(key: Tensor, position: int, direction: int, theta: float) -> Tensor:
    """(d,) turned by its position: pairs as complex numbers, which is not how the package does it."""
    half = len(key) // 2
    pairs = torch.complex(key[:half].double(), key[half:].double())
    frequency = theta ** (-torch.arange(0, 2 * half, 2, dtype=torch.float64) / (2 * half))
    pairs = pairs * torch.polar(torch.ones_like(frequency), direction * position * frequency)
    return torch.cat((pairs.real, pairs.imag))


def merged(
    keys: Tensor,
    values: Tensor,
    image_of: dict[int, int],
    layout: MergeLayout,
    nets: nn.ModuleDict,
    layer: int,
    theta: float = 10_000.0,
) -> tuple[Tensor, Tensor]:
    """One head's (T, d) float64 keys and values. image_of: position -> which image it belongs to."""
    out, position, length = [], 0, len(keys)
    while position < length:
        group = range(position, position + layout.factor)
        inside = layout.n_sink <= position and group.stop <= length - layout.recent
        if (
            inside
            and len({image_of.get(p) for p in group}) == 1
            and _starts_group(position, image_of, layout)
        ):
            kind = "t" if image_of.get(position) is None else "i"
            raw = [turned(keys[p], p, -1, theta) if layout.unrotated else keys[p] for p in group]
            key = nets[f"compress_{kind}k"][layer](torch.cat(raw))
            value = nets[f"compress_{kind}v"][layer](torch.cat([values[p] for p in group]))
            if layout.base == "mean":
                key, value = key + sum(raw) / len(raw), value + sum(values[p] for p in group) / len(raw)
            out.append((turned(key, group[-1], 1, theta) if layout.unrotated else key, value))
            position = group.stop
        else:
            out.append((keys[position], values[position]))
            position += 1
    return torch.stack([k for k, _ in out]), torch.stack([v for _, v in out])


def _starts_group(position: int, image_of: dict[int, int], layout: MergeLayout) -> bool:
    """Groups are counted from the start of their run."""
    start = position
    while start > layout.n_sink and image_of.get(start - 1) == image_of.get(position):
        start -= 1
    return (position - start) % layout.factor == 0
