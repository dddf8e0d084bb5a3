"""Carries compression out, inline: right behind a layer's prefill attention its kept KV goes to fresh pages."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, budget, select
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.compression.repack import repack_heads, repack_layer
from fastcache.core import HostBatch, Step
from fastcache.device.streams import hand_over
from fastcache.kvcache.head_layout import HeadLayout, HeadRows, upload_layouts
from fastcache.kvcache.pages import SCRATCH_PAGE
from fastcache.kvcache.pool import KVPool

SUPPORTED_NEEDS = frozenset({"keys", "values", "window_queries"})


class MethodPlan:
    """The numbers of a method that the scheduler plans with (see `demand.CompressionPlan`)."""

    def __init__(
        self,
        method: EvictionMethod,
        compression_ratio: float,
        page_size: int,
        head_budgets: HeadBudgets | None = None,
    ) -> None:
        self.method, self.ratio = method, compression_ratio
        self.tail = max(method.window, 1)
        self._page_size, self._budgets = page_size, head_budgets
        self._layouts: dict[int, HeadLayout] = {}  # by length: sequences of one length share theirs

    def kept(self, num_tokens: int) -> int:
        keep = budget(num_tokens, self.ratio)
        if not self.method.applies_to(num_tokens, keep):
            return 0
        layout = self.layout(num_tokens)
        return keep if layout is None else layout.longest

    def layout(self, num_tokens: int) -> HeadLayout | None:
        if self._budgets is None:
            return None
        if num_tokens not in self._layouts:
            kept = self._budgets.kept(num_tokens, self.ratio)
            self._layouts[num_tokens] = HeadLayout(kept, self._page_size)
        return self._layouts[num_tokens]


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
    longest: tuple[int, ...] = ()  # with head budgets, the largest of each layer

    @classmethod
    def of(
        cls,
        table: np.ndarray,
        fresh: np.ndarray,
        lengths: Many[int],
        budgets: Many[int],
        window: np.ndarray | None,
        device: torch.device,
        layouts: Many[HeadLayout | None],
    ) -> Work:
        numbers = [np.asarray(each, np.int64) for each in (lengths, budgets)]
        tensors = [to_device(each, device) for each in (table, fresh, *numbers)]
        rows = None if window is None else to_device(window, device)
        packed, longest = None, ()
        if layouts[0] is not None:
            packed = upload_layouts(layouts, device)
            longest = tuple(np.stack([each.kept for each in layouts]).max((0, 2)).tolist())
        return cls(*tensors, rows, int(max(lengths)), int(max(budgets)), packed, longest)


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


def compress_layer(
    method: EvictionMethod, pool: KVPool, layer: int, num_layers: int, work: Work, queries: Tensor | None
) -> None:
    """Score, select and repack one layer. queries: (n, H, w, d) for a method that needs them."""
    keys, values = pool.gather(layer, work.table, work.max_length)
    heads = None if work.layouts is None else HeadRows(work.layouts, layer, keys.shape[1])
    budgets = work.budgets if heads is None else heads.kept
    largest = work.max_budget if heads is None else work.longest[layer]
    view = LayerKV(layer, num_layers, keys, values, work.lengths, budgets, window_queries=queries)
    kept = select(method.score(view), work.lengths, budgets, largest)
    if heads is None:
        repack_layer(pool, layer, keys, values, kept, work.fresh)
    else:
        repack_heads(pool, heads, keys, values, kept, work.fresh)


class InlineCompressor:
    """Scores, selects and repacks one layer at a time, for all sequences of the step at once.

    With a `stream` of its own this runs beside the next layers' prefill: it reads pages nobody writes any more
    and writes pages nobody reads yet. `finish` joins the streams at the end of the step.
    """

    def __init__(
        self,
        method: EvictionMethod,
        pool: KVPool,
        num_layers: int,
        stream: torch.cuda.Stream | None = None,
        layout: Callable[[int], HeadLayout | None] = lambda num_tokens: None,
    ) -> None:
        self.method, self.pool, self.num_layers, self.layout = method, pool, num_layers, layout
        self.stream = stream
        self._work: Work | None = None

    def begin(self, step: Step, host: HostBatch) -> bool:
        """Note which sequences of the step are to be compressed; False if none is."""
        rows = [row for row, chunk in enumerate(step.chunks) if chunk.kept]
        if not rows:
            self._work = None
            return False
        chunks = [step.chunks[row] for row in rows]
        self._work = Work.of(
            host.page_table[rows],
            page_tables([chunk.fresh_pages for chunk in chunks]),
            host.kv_lens[rows],
            [chunk.kept for chunk in chunks],
            window_rows(host, rows, self.method.window),
            self.pool.device,
            [self.layout(chunk.seq.request.compress_at) for chunk in chunks],
        )
        return True

    def layer(self, layer: int, q: Tensor) -> None:
        """q: (T, H, d), the step's rotated queries. Its keys and values are in the pool already."""
        if self.stream is None:
            self._compress(layer, q)
            return
        hand_over(torch.cuda.current_stream(), self.stream, q)
        with torch.cuda.stream(self.stream):
            self._compress(layer, q)

    def finish(self) -> None:
        """Steps after this one read the fresh pages and reuse the old ones: order them behind the copies."""
        if self.stream is not None:
            hand_over(self.stream, torch.cuda.current_stream())

    def _compress(self, layer: int, q: Tensor) -> None:
        queries = None
        if "window_queries" in self.method.needs:
            queries = q[self._work.window_rows].transpose(1, 2)
        compress_layer(self.method, self.pool, layer, self.num_layers, self._work, queries)
