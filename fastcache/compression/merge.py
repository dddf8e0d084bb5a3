"""Merging k neighbouring KV entries into one by a small network: the arithmetic, differentiable, any device.

Keys are merged unrotated: each is turned back by its own position, the group is merged, and the result is turned
to the position of the group's last entry. A rotated key depends on its position, and a network would have to
learn every position anew. `MergeLayout.unrotated` False merges keys as they are stored, for networks trained so.

Sizes: B sequences, Hk KV heads, T stored entries, G groups, k entries per group, d the head size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.base import whole_number
from fastcache.compression.transform import Spans
from fastcache.config import StrictConfig, one_of

BASES = ("none", "mean")
KINDS = ("t", "i")  # text, image
# weight and bias of three linear layers: (h, k d), (h,), (h, h), (h,), (d, h), (d,)
Net = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MergeLayout(StrictConfig):
    """Which entries are merged, and what the networks were trained to do with them.

    factor: entries per group. n_sink, recent: first and last entries that are never merged.
    unrotated: keys are merged without their rotation. base: what is added to a network's output, "mean" of the
        group or "none".
    """

    factor: int
    n_sink: int = 0
    recent: int = 0
    unrotated: bool = False
    base: str = "none"

    def __post_init__(self) -> None:
        whole_number("factor", self.factor, minimum=2)
        whole_number("n_sink", self.n_sink, minimum=0)
        whole_number("recent", self.recent, minimum=0)
        one_of("base", self.base, BASES)

    def segments(self, length: int, spans: Spans) -> list[tuple[int, int, bool]]:
        """(first, end, is_image) of the runs within which groups are formed, in order."""
        low, high = self.n_sink, length - self.recent
        runs, at = [], low
        for start, count in spans:
            first, end = max(start, low), min(start + count, high)
            if first < end:
                runs += [(at, first, False), (first, end, True)]
                at = end
        runs.append((at, high, False))
        return [run for run in runs if run[0] < run[1]]

    def kept(self, length: int, spans: Spans = ()) -> int:
        """Entries left of `length`: groups, and what fills no group. 0 if there is nothing to merge."""
        groups = sum((end - first) // self.factor for first, end, _ in self.segments(length, spans))
        return length - groups * (self.factor - 1) if groups else 0


@dataclass(frozen=True)
class MergePlan:
    """Where everything comes from, on the device; the same for all layers and heads.

    rows: per kind of span ("t" text, "i" image) the entries of each group, (B, G, k) int64; kinds without a group
    are absent. source: (B, K) int64, for each kept entry the stored one to copy or, where `merged`, its group among
    the text groups followed by the image groups. lengths: kept entries per sequence.
    kinds, first: (B, K) int64, the same as a kernel wants it: 0 copied, 1 text group, 2 image group, -1 behind a
    sequence's own; and the first stored entry of each.
    """

    rows: Mapping[str, Tensor]
    source: Tensor
    merged: Tensor
    kinds: Tensor
    first: Tensor
    lengths: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.rows.values(), self.source, self.merged, self.kinds, self.first]


def make_plan(
    lengths: Sequence[int], image_spans: Sequence[Spans], layout: MergeLayout, device: torch.device
) -> MergePlan:
    """A plan for B sequences. A sequence with nothing to merge keeps all its entries."""
    parts = [_one(length, tuple(spans), layout) for length, spans in zip(lengths, image_spans, strict=True)]
    starts = {kind: _pad([one.starts[kind] for one in parts]) for kind in KINDS}
    flags = _pad([one.flags for one in parts])
    # Merged entries are numbered text first, then images, each padded to the widest sequence.
    source = _pad([one.index for one in parts]) + np.where(flags == 2, starts["t"].shape[1], 0)

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return MergePlan(
        {
            kind: to(first[:, :, None] + np.arange(layout.factor))
            for kind, first in starts.items()
            if first.shape[1]
        },
        to(source),
        to(flags > 0),
        to(_pad([one.flags for one in parts], -1)),
        to(_pad([one.first for one in parts])),
        tuple(len(one.flags) for one in parts),
    )


class _Sequence(NamedTuple):
    """starts: of its groups, by kind. Per kept entry: flags, what it is (0 stored, 1 text, 2 image); index, which
    stored entry or which group; first, the first stored entry of it."""

    starts: dict[str, np.ndarray]
    flags: np.ndarray
    index: np.ndarray
    first: np.ndarray


@functools.lru_cache(maxsize=256)
def _one(length: int, spans: tuple[tuple[int, int], ...], layout: MergeLayout) -> _Sequence:
    """Contexts of one shape share theirs; nobody writes into it."""
    k, at = layout.factor, 0
    starts: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    runs, count = [], dict.fromkeys(KINDS, 0)

    def add(flag: int, index: np.ndarray, first: np.ndarray) -> None:
        runs.append((np.full(len(index), flag, np.int64), index, first))

    for first, end, is_image in layout.segments(length, spans):
        kind, groups = KINDS[is_image], (end - first) // k
        kept = np.arange(at, first)
        add(0, kept, kept)
        own = first + k * np.arange(groups)
        add(1 + is_image, np.arange(count[kind], count[kind] + groups), own)
        starts[kind].append(own)
        count[kind] += groups
        at = first + k * groups
    kept = np.arange(at, length)
    add(0, kept, kept)
    whole = {kind: np.concatenate([np.zeros(0, np.int64), *own]) for kind, own in starts.items()}
    return _Sequence(whole, *(np.concatenate(column) for column in zip(*runs, strict=True)))


def _pad(rows: list[np.ndarray], fill: int = 0) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out


def merge_layer(
    keys: Tensor,
    values: Tensor,
    plan: MergePlan,
    nets: Mapping[str, Net],
    layout: MergeLayout,
    cos_sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """One layer's cache, merged. keys, values: (B, Hk, T, d); nets by "tk", "tv", "ik", "iv".

    Returns keys and values (B, Hk, K, d) in the cache's dtype. The networks run in their own dtype. A plan of one
    sequence serves any number of its length. All layers at once: caches (L, B, Hk, T, d), networks stacked alike.
    """
    new_keys, new_values = [], []
    for kind, rows in plan.rows.items():
        group_keys = _rows(keys, rows)
        if layout.unrotated:
            group_keys = rotate(group_keys, cos_sin[rows][:, None], -1.0)
        group_keys = run_net(nets[kind + "k"], group_keys, layout.base)
        if layout.unrotated:
            group_keys = rotate(group_keys, cos_sin[rows[..., -1]][:, None], 1.0)
        new_keys.append(group_keys)
        new_values.append(run_net(nets[kind + "v"], _rows(values, rows), layout.base))
    return _assemble(keys, new_keys, plan), _assemble(values, new_values, plan)


def run_net(net: Net, group: Tensor, base: str) -> Tensor:
    """(..., k, d) of any dtype -> (..., d) in the network's: linear, ReLU, linear, ReLU, linear, plus the base."""
    group = group.to(net[0].dtype)
    hidden = F.relu(_linear(group.flatten(-2), net[0], net[1]))
    hidden = F.relu(_linear(hidden, net[2], net[3]))
    out = _linear(hidden, net[4], net[5])
    return out + group.mean(-2) if base == "mean" else out


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., n) with weight (m, n), or (L, ..., n) with (L, m, n), to m columns."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias[:, None], x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


def rotate(x: Tensor, cos_sin: Tensor, direction: float) -> Tensor:
    """Turn (..., d) by the angles of (..., 2, d / 2), halves paired as in GPT-NeoX; -1.0 turns back. float32."""
    cos, sin = cos_sin.unbind(-2)
    first, second = x.float().chunk(2, dim=-1)
    sin = sin * direction
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rows(cache: Tensor, rows: Tensor) -> Tensor:
    """(..., B, Hk, T, d) and (B, G, k) -> (..., B, Hk, G, k, d)."""
    index = rows.flatten(1)[:, None, :, None].expand(*cache.shape[:-2], -1, cache.shape[-1])
    return cache.gather(-2, index).unflatten(-2, rows.shape[1:])


def _assemble(cache: Tensor, groups: list[Tensor], plan: MergePlan) -> Tensor:
    """Stored and merged entries in their order: (..., B, Hk, K, d)."""
    merged = plan.merged[:, None, :, None]
    source = plan.source[:, None, :, None].expand(*cache.shape[:-2], -1, cache.shape[-1])
    stored = cache.gather(-2, source.masked_fill(merged, 0))
    if not groups:
        return stored
    new = (groups[0] if len(groups) == 1 else torch.cat(groups, dim=-2)).to(cache.dtype)
    return torch.where(merged, new.gather(-2, source.masked_fill(~merged, 0)), stored)
