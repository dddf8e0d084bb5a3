"""Carries compression out, inline: right behind a layer's prefill attention its kept KV goes to fresh pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, budget, select
from fastcache.compression.repack import repack_layer
from fastcache.core import HostBatch, Step
from fastcache.device.streams import hand_over
from fastcache.kvcache.pages import SCRATCH_PAGE
from fastcache.kvcache.pool import KVPool

SUPPORTED_NEEDS = frozenset({"keys", "values", "window_queries"})


class MethodPlan:
    """The numbers of a method that the scheduler plans with (see `demand.CompressionPlan`)."""

    def __init__(self, method: EvictionMethod, compression_ratio: float) -> None:
        self.method, self.ratio = method, compression_ratio
        self.tail = max(method.window, 1)

    def kept(self, num_tokens: int) -> int:
        keep = budget(num_tokens, self.ratio)
        return keep if self.method.applies_to(num_tokens, keep) else 0


@dataclass(frozen=True)
class _Work:
    """The n sequences of one step whose context ends in it. Tables on the device, sizes on the host."""

    table: Tensor  # (n, pages) their full pages
    fresh: Tensor  # (n, pages) where the kept entries go
    lengths: Tensor  # (n,) int64
    budgets: Tensor  # (n,) int64
    window_rows: Tensor  # (n, w) int64: rows of q that hold the last w queries
    max_length: int
    max_budget: int


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
    ) -> None:
        self.method, self.pool, self.num_layers = method, pool, num_layers
        self.stream = stream
        self._work: _Work | None = None

    def begin(self, step: Step, host: HostBatch) -> bool:
        """Note which sequences of the step are to be compressed; False if none is."""
        rows = [row for row, chunk in enumerate(step.chunks) if chunk.kept]
        if not rows:
            self._work = None
            return False
        chunks = [step.chunks[row] for row in rows]
        width = max(len(chunk.fresh_pages) for chunk in chunks)
        fresh = np.full((len(rows), width), SCRATCH_PAGE, np.int32)
        for row, chunk in enumerate(chunks):
            fresh[row, : len(chunk.fresh_pages)] = chunk.fresh_pages
        lengths = host.kv_lens[rows]
        budgets = np.asarray([chunk.kept for chunk in chunks], np.int64)
        ends = host.cu_seqlens_q[1:][rows]
        window = np.arange(-self.method.window, 0)

        def to(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.pool.device, non_blocking=True)

        self._work = _Work(
            table=to(host.page_table[rows]),
            fresh=to(fresh),
            lengths=to(lengths.astype(np.int64)),
            budgets=to(budgets),
            window_rows=to(ends[:, None] + window),
            max_length=int(lengths.max()),
            max_budget=int(budgets.max()),
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
        work = self._work
        keys, values = self.pool.gather(layer, work.table, work.max_length)
        queries = None
        if "window_queries" in self.method.needs:
            queries = q[work.window_rows].transpose(1, 2)
        view = LayerKV(
            layer, self.num_layers, keys, values, work.lengths, work.budgets, window_queries=queries
        )
        kept = select(self.method.score(view), work.lengths, work.budgets, work.max_budget)
        repack_layer(self.pool, layer, keys, values, kept, work.fresh)
