"""What is compressed together: tables, lengths and budgets of n sequences on the device, sizes on the host."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastcache.compression.transform import Plan
from fastcache.core import HostBatch
from fastcache.kvcache.head_layout import Layout, SharedLayout, SharedRows, upload_layouts
from fastcache.kvcache.pages import SCRATCH_PAGE


@dataclass(frozen=True)
class Work:
    """The n sequences that are compressed together. Tables on the device, sizes on the host."""

    table: Tensor  # (n, pages) their full pages
    fresh: Tensor  # (n, pages) where the kept entries go
    lengths: Tensor  # (n,) int64
    budgets: Tensor  # (n,) int64
    window_rows: Tensor | None  # (n, w) int64: rows of q that hold the last w queries, inside a prefill
    max_length: int
    max_budget: int
    layouts: Tensor | None = None  # (n, 3 x heads + 1) with head budgets, which come before `budgets`
    longest: tuple[int, ...] = ()  # with head budgets of a file, the largest of each layer
    shared: SharedRows | None = None  # heads that share: `layouts` is theirs, filled layer by layer
    plan: Plan | None = None  # of a transform

    @classmethod
    def of(
        cls,
        table: np.ndarray,
        fresh: np.ndarray,
        lengths: Many[int],
        budgets: Many[int],
        window: np.ndarray | None,
        device: torch.device,
        layouts: Many[Layout | None],
        seats: Many[int] = (),
    ) -> Work:
        """`seats` are needed where `layouts` are shared."""
        numbers = [np.asarray(each, np.int64) for each in (lengths, budgets)]
        tensors = [to_device(each, device) for each in (table, fresh, *numbers)]
        rows = None if window is None else to_device(window, device)
        packed, longest, shared = None, (), None
        if isinstance(layouts[0], SharedLayout):
            shared = SharedRows(layouts, seats, device)
            packed = shared.packed
        elif layouts[0] is not None:
            packed = upload_layouts(layouts, device)
            longest = tuple(np.stack([each.kept for each in layouts]).max((0, 2)).tolist())
        return cls(*tensors, rows, int(max(lengths)), int(max(budgets)), packed, longest, shared)

    def across(self, layers: range, num_pages: int) -> Work:
        """The same sequences in each of `layers`, as so many sequences of a pool that is one layer
        (`KVPool.as_one_layer`). num_pages: of a layer."""
        first = torch.arange(layers.start, layers.stop, device=self.table.device, dtype=self.table.dtype)
        first = first[:, None, None] * num_pages
        return replace(
            self,
            table=(self.table + first).flatten(0, 1),
            fresh=(self.fresh + first).flatten(0, 1),
            lengths=self.lengths.repeat(len(layers)),
            budgets=self.budgets.repeat(len(layers)),
        )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def page_tables(pages: Many[Many[int]]) -> np.ndarray:
    """(n, longest) int32, the scratch page where a sequence has fewer."""
    table = np.full((len(pages), max(map(len, pages))), SCRATCH_PAGE, np.int32)
    for row, numbers in enumerate(pages):
        table[row, : len(numbers)] = numbers
    return table


def window_rows(host: HostBatch, rows: list[int], window: int) -> np.ndarray:
    """(n, w) int64: where a step's packed queries hold the last `window` of each of `rows`."""
    return host.cu_seqlens_q[1:][rows][:, None] + np.arange(-window, 0)


def similar(rows: Many[int], lengths: np.ndarray, most: int | None = None) -> list[list[int]]:
    """`rows` in groups that are padded to each other, each ascending: none is less than half as long as its longest,
    so that padding never takes more than the contexts themselves. lengths: by row. most: rows of a group."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -lengths[row]):
        full = bool(groups) and len(groups[-1]) == most
        if not groups or full or 2 * lengths[row] < lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]


@dataclass(frozen=True)
class Packed:
    """Where a step's packed entries hold n contexts that start and end in it."""

    starts: Tensor  # (n,) int64: their first rows
    first: int  # the first row of the first one
    rows: Tensor | None  # (n, longest) int64; None where they are equally long and follow each other

    @classmethod
    def of(cls, starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Packed:
        longest, rows = int(lengths.max()), None
        if (lengths != longest).any() or (np.diff(starts) != longest).any():
            within = np.minimum(np.arange(longest), lengths[:, None] - 1)
            rows = to_device(starts[:, None] + within, device)
        return cls(to_device(starts, device), int(starts[0]), rows)

    def across(self, layers: int, num_tokens: int, longest: int) -> Packed:
        """The same contexts in each of as many layers, whose `num_tokens` entries follow each other's."""
        first = torch.arange(layers, device=self.starts.device)[:, None] * num_tokens
        starts, rows = (self.starts + first).flatten(), self.rows
        if rows is None:
            rows = self.starts[:, None] + torch.arange(longest, device=self.starts.device)
        return Packed(starts, self.first, (rows + first[:, :, None]).flatten(0, 1))

    def padded(self, x: Tensor, longest: int) -> Tensor:
        """(T, heads, d) -> (n, heads, longest, d), a view where that is possible."""
        if self.rows is not None:
            return x[self.rows].transpose(1, 2)
        n = len(self.starts)
        return x[self.first : self.first + n * longest].unflatten(0, (n, longest)).transpose(1, 2)

    def shaped(self, x: Tensor, longest: int) -> Tensor:
        """What has the shape of `padded`, without its content."""
        return x[:1].transpose(0, 1)[None].expand(len(self.starts), -1, longest, -1)


@dataclass(frozen=True)
class Rotation:
    """How a model rotates. cos_sin: (max_positions, 2, d / 2); inv_freq: (d / 2,), both float32 on the device."""

    cos_sin: Tensor
    inv_freq: Tensor


@dataclass(frozen=True)
class Computed:
    """One layer of a step: rotated q (T, H, d), k and v (T, Hk, d), the backend's `lse`, and ratings (T, Hk)."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    lse: Tensor | None
    ratings: Tensor | None = None

    @classmethod
    def across(cls, layers: Many[Computed]) -> Computed:
        """All of `layers` behind each other, as `Packed.across` finds them."""
        columns = zip(*((x.q, x.k, x.v, x.lse, x.ratings) for x in layers), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.lse, self.ratings) if x is not None]
