"""Carries compression out, inline: right behind a layer's prefill attention its kept KV goes to fresh pages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, budget
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.compression.kernels import kernels_for
from fastcache.compression.repack import repack_heads, repack_layer, repack_packed
from fastcache.core import HostBatch, Step
from fastcache.device.streams import hand_over
from fastcache.device.timing import Span
from fastcache.engine.work import Packed, Work, page_tables, window_rows
from fastcache.kvcache.head_layout import HeadLayout, HeadRows
from fastcache.kvcache.pool import KVPool

SUPPORTED_NEEDS = frozenset({"keys", "values", "window_queries", "replay_scores"})


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
        self.replays = "replay_scores" in method.needs
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


class LayerCompressor:
    """Scores, selects and repacks one layer of n sequences at once."""

    def __init__(self, method: EvictionMethod, pool: KVPool, num_layers: int) -> None:
        self.method, self.pool, self.num_layers = method, pool, num_layers
        self.kernels = kernels_for(pool.device)

    def stored(self, layer: int, work: Work, queries: Tensor | None, replayed: Tensor | None = None) -> None:
        """Contexts out of their pages. queries: (n, H, w, d), replayed: (n, Hk, T), for methods that need them."""
        keys, values = self.pool.gather(layer, work.table, work.max_length)
        heads, kept = self._kept(layer, work, keys, values, queries, replayed)
        if heads is None:
            repack_layer(self.pool, layer, keys, values, kept, work.fresh)
        else:
            repack_heads(self.pool, heads, keys, values, kept, work.fresh)

    def packed(
        self, layer: int, work: Work, where: Packed, k: Tensor, v: Tensor, queries: Tensor | None
    ) -> None:
        """Contexts out of a step's own k and v, (T, Hk, d)."""
        needs, longest = self.method.needs, work.max_length
        keys = where.padded(k, longest) if "keys" in needs else where.shaped(k, longest)
        values = where.padded(v, longest) if "values" in needs else None
        heads, kept = self._kept(layer, work, keys, values, queries)
        if heads is not None:
            keys, values = where.padded(k, longest), where.padded(v, longest)
            repack_heads(self.pool, heads, keys, values, kept, work.fresh)
        elif self.kernels.repack is None:
            repack_packed(self.pool, layer, k, v, where.starts, kept, work.fresh)
        else:
            pages = self.pool.keys[layer], self.pool.values[layer]
            self.kernels.repack(*pages, k, v, where.starts, kept, work.fresh)

    def _kept(
        self,
        layer: int,
        work: Work,
        keys: Tensor,
        values: Tensor | None,
        queries: Tensor | None,
        replayed: Tensor | None = None,
    ) -> tuple[HeadRows | None, Tensor]:
        """The layer's head budgets, if it has any, and the kept positions (n, Hk, K)."""
        heads = None if work.layouts is None else HeadRows(work.layouts, layer, keys.shape[1])
        budgets = work.budgets if heads is None else heads.kept
        largest = work.max_budget if heads is None else work.longest[layer]
        view = LayerKV(
            layer,
            self.num_layers,
            keys,
            values,
            work.lengths,
            budgets,
            window_queries=queries,
            replay_scores=replayed,
        )
        scores = self.kernels.score(self.method, view)
        return heads, self.kernels.select(scores, work.lengths, budgets, largest)


class InlineCompressor:
    """Compresses each layer right behind its attention, all sequences of the step at once.

    A context that starts and ends in the step is compressed out of the step's own keys and values; one that was
    begun earlier, out of its pages. With a `stream` of its own this runs beside the next layers' prefill: it reads
    what nobody writes any more and writes pages nobody reads yet. `finish` joins the streams at the step's end.
    """

    def __init__(
        self,
        method: EvictionMethod,
        pool: KVPool,
        num_layers: int,
        stream: torch.cuda.Stream | None = None,
        layout: Callable[[int], HeadLayout | None] = lambda num_tokens: None,
    ) -> None:
        self.method, self.pool, self.layout = method, pool, layout
        self.layers = LayerCompressor(method, pool, num_layers)
        self.stream = stream
        self.timed = False
        self.spans: list[
            Span
        ] = []  # where timed: of this step's layers, as far as they delay the main stream
        self._works: list[tuple[Work, Packed | None]] = []

    def begin(self, step: Step, host: HostBatch) -> bool:
        """Note which sequences of the step are to be compressed; False if none is."""
        self.spans = []
        rows = [row for row, chunk in enumerate(step.chunks) if chunk.kept]
        stored = [row for row in rows if step.chunks[row].kv_start]
        packed = [row for row in rows if not step.chunks[row].kv_start]
        self._works = []
        if stored:
            self._works.append((self._work(step, host, stored), None))
        if packed:
            starts = host.cu_seqlens_q[:-1][packed]
            where = Packed.of(starts, host.kv_lens[packed], self.pool.device)
            self._works.append((self._work(step, host, packed), where))
        return bool(rows)

    def _work(self, step: Step, host: HostBatch, rows: list[int]) -> Work:
        chunks = [step.chunks[row] for row in rows]
        return Work.of(
            host.page_table[rows],
            page_tables([chunk.fresh_pages for chunk in chunks]),
            host.kv_lens[rows],
            [chunk.kept for chunk in chunks],
            window_rows(host, rows, self.method.window),
            self.pool.device,
            [self.layout(chunk.seq.request.compress_at) for chunk in chunks],
        )

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q: (T, H, d), the step's rotated queries; k, v: (T, Hk, d). What has a slot is in the pool already."""
        if self.stream is None:
            if not self.timed:
                self._compress(layer, q, k, v)
                return
            self.spans.append(Span(self.pool.device))
            self.spans[-1].start()
            self._compress(layer, q, k, v)
            self.spans[-1].stop()
            return
        hand_over(torch.cuda.current_stream(), self.stream, q, k, v)
        with torch.cuda.stream(self.stream):
            self._compress(layer, q, k, v)

    def finish(self) -> None:
        """Steps after this one read the fresh pages and reuse the old ones: order them behind the copies."""
        if self.stream is not None:
            hand_over(self.stream, torch.cuda.current_stream())

    def _compress(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        for work, where in self._works:
            queries = None
            if "window_queries" in self.method.needs:
                queries = q[work.window_rows].transpose(1, 2)
            if where is None:
                self.layers.stored(layer, work, queries)
            else:
                self.layers.packed(layer, work, where, k, v, queries)
