"""Where entries are when every KV head keeps its own number of them.

A page of the pool holds one page-sized unit for each (layer, KV head). A sequence with a `HeadLayout` owns pages like
any other, but its units belong to whichever heads need them: unit u lies in its page u // R, at place u % R, where R
is layers x KV heads. Each head's kept entries fill units of their own; after that every head takes one new unit each
`page_size` appended entries, in a fixed order. So the place of any entry is arithmetic, no table per head is kept, and
what is freed is whole pages. A cache that keeps nothing apart (`kept` all zero) is the plain layout: page u // R holds
the same entries of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from fastcache.kvcache.pool import KVPool


class HeadLayout:
    """The layout of one sequence, on the host. kept: (layers, kv_heads) entries that compression left."""

    def __init__(self, kept: np.ndarray, page_size: int) -> None:
        self.kept, self.page_size = kept.astype(np.int64), page_size
        units = -(-self.kept // page_size).ravel()
        self.heads = units.size
        self.units = int(units.sum())
        self.first = np.cumsum(units) - units
        # A head takes its next unit with this appended entry, counted from 1, and every page_size entries after.
        next_unit = units * page_size + 1 - self.kept.ravel()
        self.rank = np.empty(self.heads, np.int64)
        self.rank[np.argsort(next_unit, kind="stable")] = np.arange(self.heads)
        self._taken = np.searchsorted(np.sort(next_unit), np.arange(page_size), side="right").tolist()

    @property
    def longest(self) -> int:
        return int(self.kept.max())

    @property
    def mean(self) -> int:
        """Entries kept per head, rounded to the nearest."""
        return round(float(self.kept.mean()))

    def pages(self, appended: int) -> int:
        """Pages that hold the kept entries and `appended` more in every head."""
        rounds, rest = divmod(appended, self.page_size)
        return -(-(self.units + rounds * self.heads + self._taken[rest]) // self.heads)

    def packed(self) -> np.ndarray:
        """(3 x heads + 1,) int32: kept, first unit and rank of each head, then the number of units."""
        return np.concatenate((self.kept.ravel(), self.first, self.rank, [self.units])).astype(np.int32)


class SharedLayout:
    """Where the entries of one sequence go when its heads share a total, and only the device learns who gets what.

    Units are reserved for the worst case of each group of heads that share, less than a page more than for equal heads;
    after that whole rounds of one unit per head. `longest`: no head keeps more. mean: kept entries per head.
    """

    def __init__(self, mean: int, longest: int, groups: int, heads_per_group: int, page_size: int) -> None:
        self.mean, self.longest, self.page_size, self.groups = mean, longest, page_size, groups
        self.heads = groups * heads_per_group
        self.group_units = heads_per_group * (mean + page_size - 1) // page_size
        self.units = groups * self.group_units

    def pages(self, appended: int) -> int:
        """Pages that hold the kept entries and `appended` more in every head."""
        return -(-self.units // self.heads) + -(-appended // self.page_size)


class SharedRows:
    """The packed layouts of n sequences whose heads share, on the device, filled in one group after the other."""

    def __init__(self, layouts: Many[SharedLayout], seats: Many[int], device: torch.device) -> None:
        heads, self._page_size = layouts[0].heads, layouts[0].page_size
        numbers = [
            [x.units for x in layouts],
            [x.group_units for x in layouts],
            [x.mean for x in layouts],
            seats,
        ]
        numbers = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
        units, self._group_units, self.means, self._seats = numbers
        self.by_layer = layouts[0].groups > 1
        self.largest_mean = max(x.mean for x in layouts)
        self.packed = torch.zeros((len(layouts), 3 * heads + 1), dtype=torch.int32, device=device)
        self.packed[:, 2 * heads : 3 * heads] = torch.arange(heads, device=device)
        self.packed[:, -1] = units

    def fill(self, group: int, counts: Tensor) -> None:
        """counts: (n, heads of the group) int64."""
        width, heads = counts.shape[1], (self.packed.shape[1] - 1) // 3
        units = -(-counts // self._page_size)
        first = group * self._group_units[:, None] + units.cumsum(1) - units
        self.packed[:, group * width : (group + 1) * width] = counts
        self.packed[:, heads + group * width : heads + (group + 1) * width] = first

    def publish(self, table: LayoutTable) -> None:
        """All groups are filled: attention may read them from here on, in the current stream's order."""
        table.packed[self._seats] = self.packed


class HeadRows:
    """One layer's part of n packed layouts, on the device: each (n, kv_heads) int64, `units` (n, 1, 1)."""

    def __init__(self, packed: Tensor, layer: int, kv_heads: int) -> None:
        self.packed, self.layer = packed, layer
        parts = packed[:, :-1].unflatten(1, (3, -1))[:, :, layer * kv_heads : (layer + 1) * kv_heads].long()
        self.kept, self.first, self.rank = parts.unbind(1)
        self.units = packed[:, -1].long()[:, None, None]


def entry_rows(pool: KVPool, rows: HeadRows, page_tables: Tensor, entries: Tensor) -> Tensor:
    """Rows of the pool, read as (-1, head_dim), that hold entries of one layer.

    page_tables: (n, max_pages) int. entries: (n or 1, kv_heads or 1, K) int64, index within each head. Returns
    (n, kv_heads, K) int64; for an entry beyond what a sequence's pages hold, some row that must not be used.
    """
    heads, size = pool.shape.num_layers * pool.shape.kv_heads, pool.page_size
    kept_units = (-(-rows.kept // size))[:, :, None]
    block = entries // size
    grown = rows.units + (block - kept_units) * heads + rows.rank[:, :, None]
    unit = torch.where(block < kept_units, rows.first[:, :, None] + block, grown)
    column = (unit // heads).clamp(max=page_tables.shape[1] - 1)
    page = page_tables.long().gather(1, column.flatten(1)).view(unit.shape)
    place = unit % heads
    layer, head = place // pool.shape.kv_heads, place % pool.shape.kv_heads
    return ((layer * pool.num_pages + page) * pool.shape.kv_heads + head) * size + entries % size


def plain_rows(pool: KVPool, layer: int, page_tables: Tensor, entries: Tensor) -> Tensor:
    """As `entry_rows`, for sequences in the plain layout, whose pages hold the same entries of all heads.

    entries: (n, kv_heads, K) int64, each within its sequence's pages.
    """
    heads, size = pool.shape.kv_heads, pool.page_size
    page = page_tables.long().gather(1, (entries // size).flatten(1)).view(entries.shape)
    head = torch.arange(heads, device=entries.device)[:, None]
    return ((layer * pool.num_pages + page) * heads + head) * size + entries % size


Layout = HeadLayout | SharedLayout


class LayoutTable:
    """The layout of each seat's sequence: packed on the device, what planning needs of it on the host too."""

    def __init__(self, pool: KVPool, seats: int) -> None:
        shape = (pool.shape.num_layers, pool.shape.kv_heads)
        self._device = pool.device
        plain = HeadLayout(np.zeros(shape, np.int64), pool.page_size)
        self._plain = torch.from_numpy(plain.packed()).to(pool.device)
        self.packed = self._plain.repeat(seats, 1)
        self.ragged = np.zeros(seats, bool)
        self.longest = np.zeros(seats, np.int64)
        self._of: list[Layout | None] = [None] * seats

    def sync(self, seats: Many[int], layouts: Many[Layout | None]) -> None:
        """Bring the seats' rows up to date. None is the plain layout. Ordered with the current stream.

        A `SharedLayout` has its rows from `SharedRows.publish`, after the sequence was plain in the same seat.
        """
        for seat, layout in zip(seats, layouts, strict=False):  # the padded rows of a graph have no sequence
            if layout is self._of[seat]:
                continue
            self._of[seat] = layout
            self.ragged[seat], self.longest[seat] = (
                layout is not None,
                0 if layout is None else layout.longest,
            )
            if layout is None:
                self.packed[seat] = self._plain
            elif isinstance(layout, HeadLayout):
                self.packed[seat] = upload_layouts([layout], self._device)[0]


def upload_layouts(layouts: Many[HeadLayout], device: torch.device) -> Tensor:
    """(n, 3 x heads + 1) int32 on the device, without waiting for it."""
    packed = torch.from_numpy(np.stack([layout.packed() for layout in layouts]))
    return packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed
