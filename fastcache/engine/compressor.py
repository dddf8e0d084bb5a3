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
from fastcache.engine.work import Computed, Packed, Rotation, Work, page_tables, window_rows
from fastcache.kvcache.head_layout import HeadLayout, HeadRows
from fastcache.kvcache.pool import KVPool

# What only the prefill itself can tell, and only about a context whose queries are all computed in one step.
NEEDS_ALL_QUERIES = frozenset({"attention_mass", "query_stats"})


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
        self._whole = bool(method.needs & NEEDS_ALL_QUERIES)
        self.replays = "replay_scores" in method.needs
        self._page_size, self._budgets = page_size, head_budgets
        self._layouts: dict[int, HeadLayout] = {}  # by length: sequences of one length share theirs

    def tail(self, num_tokens: int) -> int:
        return num_tokens if self._whole else max(self.method.window, 1)

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
    """Scores, selects and repacks one layer of n sequences at once. rotation: for methods that need query_stats."""

    def __init__(
        self, method: EvictionMethod, pool: KVPool, num_layers: int, rotation: Rotation | None
    ) -> None:
        self.method, self.pool, self.num_layers, self.rotation = method, pool, num_layers, rotation
        self.kernels = kernels_for(pool.device)

    def stored(self, layer: int, work: Work, queries: Tensor | None, replayed: Tensor | None = None) -> None:
        """Contexts out of their pages. queries: (n, H, w, d), replayed: (n, Hk, T), for methods that need them."""
        keys, values = self.pool.gather(layer, work.table, work.max_length)
        seen = {"window_queries": queries, "replay_scores": replayed}
        heads, kept = self._kept(layer, work, keys, values, seen)
        if heads is None:
            repack_layer(self.pool, layer, keys, values, kept, work.fresh)
        else:
            repack_heads(self.pool, heads, keys, values, kept, work.fresh)

    def packed(self, layer: int, work: Work, where: Packed, step: Computed, queries: Tensor | None) -> None:
        """Contexts out of what the step has computed."""
        needs, longest, k, v = self.method.needs, work.max_length, step.k, step.v
        keys = where.padded(k, longest) if "keys" in needs else where.shaped(k, longest)
        values = where.padded(v, longest) if "values" in needs else None
        seen = {"window_queries": queries, **self._observed(work, where, step, keys)}
        heads, kept = self._kept(layer, work, keys, values, seen)
        if heads is not None:
            keys, values = where.padded(k, longest), where.padded(v, longest)
            repack_heads(self.pool, heads, keys, values, kept, work.fresh)
        elif self.kernels.repack is None:
            repack_packed(self.pool, layer, k, v, where.starts, kept, work.fresh)
        else:
            pages = self.pool.keys[layer], self.pool.values[layer]
            self.kernels.repack(*pages, k, v, where.starts, kept, work.fresh)

    def _observed(self, work: Work, where: Packed, step: Computed, keys: Tensor) -> dict[str, Tensor]:
        """What the method must know of all queries, as fields of `LayerKV`."""
        needs, longest = self.method.needs, work.max_length
        if not needs & NEEDS_ALL_QUERIES:
            return {}
        queries, seen = where.padded(step.q, longest), {}
        if "attention_mass" in needs:
            keys = where.padded(step.k, longest)
            lse = None if step.lse is None else where.padded(step.lse, longest)
            seen["attention_mass"] = self.kernels.attention_mass(queries, keys, work.lengths, lse)
        if "query_stats" in needs:
            cos_sin, sinks = self.rotation.cos_sin, self.method.n_sink
            mean, cov = self.kernels.query_statistics(queries, work.lengths, cos_sin, sinks)
            seen |= {"query_mean": mean, "query_cov": cov, "inv_freq": self.rotation.inv_freq}
        return seen

    def _kept(
        self, layer: int, work: Work, keys: Tensor, values: Tensor | None, seen: dict[str, Tensor | None]
    ) -> tuple[HeadRows | None, Tensor]:
        """The layer's head budgets, if it has any, and the kept positions (n, Hk, K). seen: fields of `LayerKV`."""
        heads = None if work.layouts is None else HeadRows(work.layouts, layer, keys.shape[1])
        budgets = work.budgets if heads is None else heads.kept
        largest = work.max_budget if heads is None else work.longest[layer]
        view = LayerKV(layer, self.num_layers, keys, values, work.lengths, budgets, **seen)
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
        rotation: Rotation | None = None,
    ) -> None:
        self.method, self.pool, self.layout = method, pool, layout
        self.layers = LayerCompressor(method, pool, num_layers, rotation)
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

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> None:
        """q: (T, H, d), the step's rotated queries; k, v: (T, Hk, d). What has a slot is in the pool already.
        lse: the backend's."""
        step = Computed(q, k, v, lse)
        if self.stream is None:
            if not self.timed:
                self._compress(layer, step)
                return
            self.spans.append(Span(self.pool.device))
            self.spans[-1].start()
            self._compress(layer, step)
            self.spans[-1].stop()
            return
        hand_over(torch.cuda.current_stream(), self.stream, *step.tensors)
        with torch.cuda.stream(self.stream):
            self._compress(layer, step)

    def finish(self) -> None:
        """Steps after this one read the fresh pages and reuse the old ones: order them behind the copies."""
        if self.stream is not None:
            hand_over(self.stream, torch.cuda.current_stream())

    def _compress(self, layer: int, step: Computed) -> None:
        for work, where in self._works:
            queries = None
            if "window_queries" in self.method.needs:
                queries = step.q[work.window_rows].transpose(1, 2)
            if where is None:
                self.layers.stored(layer, work, queries)
            else:
                self.layers.packed(layer, work, where, step, queries)
