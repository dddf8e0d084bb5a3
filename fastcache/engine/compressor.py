"""Carries compression out, inline: right behind a layer's prefill attention its kept KV goes to fresh pages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcache.compression.adakv import GLOBAL, safe_count
from fastcache.compression.base import EvictionMethod, budget
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.compression.layer import NEEDS_ALL_QUERIES, LayerCompressor
from fastcache.compression.layer_transform import LayerTransformer
from fastcache.compression.transform import BoundTransform, Spans
from fastcache.compression.work import Computed, Packed, Rotation, Work, page_tables, similar, window_rows
from fastcache.core import HostBatch, Step
from fastcache.device.streams import hand_over
from fastcache.device.timing import Span
from fastcache.engine.states import StateRatings
from fastcache.kvcache.head_layout import HeadLayout, Layout, LayoutTable, SharedLayout
from fastcache.kvcache.pool import KVPool

# Contexts whose query statistics are held at once: each takes a matrix of head size squared for every query head.
MOST_COVARIANCES = 32
# A step of so few tokens takes the device less time than the host needs to launch a compression in each layer.
SMALL_STEP = 4_096


class MethodPlan:
    """The numbers of a method that the scheduler plans with (see `demand.CompressionPlan`)."""

    def __init__(
        self,
        method: EvictionMethod,
        compression_ratio: float,
        page_size: int,
        head_budgets: HeadBudgets | str | None = None,
        heads: tuple[int, int] = (1, 1),
    ) -> None:
        self.method, self.ratio = method, compression_ratio
        self._whole = bool(method.needs & NEEDS_ALL_QUERIES)
        self.replays = "replay_scores" in method.needs
        self._page_size, self._budgets, self._heads = page_size, head_budgets, heads
        self._layouts: dict[int, Layout] = {}  # by length: sequences of one length share theirs

    def tail(self, num_tokens: int) -> int:
        return num_tokens if self._whole else max(self.method.window, 1)

    def kept(self, num_tokens: int, image_spans: Spans = ()) -> int:
        keep = budget(num_tokens, self.ratio)
        if not self.method.applies_to(num_tokens, keep):
            return 0
        layout = self.layout(num_tokens)
        return keep if layout is None else layout.longest

    def layout(self, num_tokens: int) -> Layout | None:
        if self._budgets is None:
            return None
        if num_tokens not in self._layouts:
            self._layouts[num_tokens] = self._make_layout(num_tokens)
        return self._layouts[num_tokens]

    def _make_layout(self, num_tokens: int) -> Layout:
        if isinstance(self._budgets, HeadBudgets):
            return HeadLayout(self._budgets.kept(num_tokens, self.ratio), self._page_size)
        (layers, heads), mean = self._heads, budget(num_tokens, self.ratio)
        if self._budgets == GLOBAL:
            return SharedLayout(mean, num_tokens, 1, layers * heads, self._page_size)
        longest = min(num_tokens, heads * mean - (heads - 1) * safe_count(mean))
        return SharedLayout(mean, longest, layers, heads, self._page_size)


def layers_of(
    method: EvictionMethod | BoundTransform, pool: KVPool, num_layers: int, rotation: Rotation | None
) -> LayerCompressor | LayerTransformer:
    if isinstance(method, BoundTransform):
        return LayerTransformer(method, pool, num_layers)
    return LayerCompressor(method, pool, num_layers, rotation)


@dataclass
class _Late:
    """Contexts that are compressed in many layers at once, and what must be kept of the layers until then.

    where: in a step's own entries, of as many layers as memory allows; None where pages have them, of all.
    """

    layers: LayerCompressor | LayerTransformer
    work: Work
    where: Packed | None
    queries: list[Tensor] = field(default_factory=list)  # by layer (n, w, H, d), for a method that needs them
    steps: list[Computed] = field(default_factory=list)  # by layer
    most: int = 0  # of them
    done: int = 0  # layers that are compressed

    def see(self, step: Computed) -> bool:
        """Whether no more layers may wait."""
        if "window_queries" in self.layers.method.needs:
            self.queries.append(step.q[self.work.window_rows])
        if self.where is None:
            return False
        self.most = self.most or self.layers.waiting(self.work, step)
        self.steps.append(step)
        return len(self.steps) == self.most

    def compress(self) -> None:
        if self.where is None:
            self.layers.stored_all(self.work, self.queries)
        elif self.steps:
            part = range(self.done, self.done + len(self.steps))
            self.layers.packed_all(part, self.work, self.where, self.steps, self.queries)
            self.queries, self.steps, self.done = [], [], part.stop


class InlineCompressor:
    """Compresses inside a prefill step, all sequences of the step at once.

    A context that starts and ends in the step is compressed out of the step's own keys and values, one that was begun
    earlier out of its pages: layer by layer, right behind the attention, or many layers in one launch, in small steps
    and out of pages. With a `stream` of its own everything goes layer by layer, beside the next layers' prefill: it
    reads what nobody writes any more and writes pages nobody reads yet. `finish` joins the streams at the step's end.
    """

    def __init__(
        self,
        method: EvictionMethod | BoundTransform,
        pool: KVPool,
        num_layers: int,
        stream: torch.cuda.Stream | None = None,
        layout: Callable[[int], Layout | None] = lambda num_tokens: None,
        rotation: Rotation | None = None,
    ) -> None:
        self.method, self.pool, self.layout = method, pool, layout
        self.layers = layers_of(method, pool, num_layers, rotation)
        self.stream = stream
        self.states: StateRatings | None = None  # of a method that needs hidden states
        self.table: LayoutTable | None = None  # where heads share: who reads what they got
        # Where timed, of this step's layers as far as they delay the main stream; and of them all on one of their own.
        self.timed = False
        self.spans: list[Span] = []
        self.beside: Span | None = None
        self._works: list[tuple[Work, Packed | None]] = []
        self._late: list[_Late] = []

    def begin(self, step: Step, host: HostBatch) -> bool:
        """Note which sequences of the step are to be compressed; False if none is."""
        self.spans, self.beside = [], None
        rows = [row for row, chunk in enumerate(step.chunks) if chunk.kept]
        stored = [row for row in rows if step.chunks[row].kv_start]
        packed = [row for row in rows if not step.chunks[row].kv_start]
        most = MOST_COVARIANCES if "query_stats" in self.method.needs else None
        paged = [(self._work(step, host, group), None) for group in similar(stored, host.kv_lens)]
        own = []
        for group in similar(packed, host.kv_lens, most):
            where = Packed.of(host.cu_seqlens_q[:-1][group], host.kv_lens[group], self.pool.device)
            own.append((self._work(step, host, group), where))
        late, self._works = (paged, []) if self.stream is None else ([], paged)
        (late if self._waits(step, rows) else self._works).extend(own)
        self._late = [_Late(self.layers, work, where) for work, where in late]
        return bool(rows)

    def _waits(self, step: Step, rows: list[int]) -> bool:
        """Whether layers of a small step's contexts wait for each other: on the main stream, where to the method they
        are all the same and no head has a budget of its own."""
        plain = all(self.layout(step.chunks[row].seq.request.compress_at) is None for row in rows)
        return plain and self.stream is None and self.layers.merges_layers and step.num_tokens <= SMALL_STEP

    @property
    def reads_later(self) -> bool:
        """Whether what `layer` is given of this step is read behind its return: by layers that wait for each other, or
        beside the next ones. Window queries of waiting layers are copies."""
        if self.stream is None:
            return any(late.where is not None for late in self._late)
        return "window_queries" in self.method.needs or any(where is not None for _, where in self._works)

    def _work(self, step: Step, host: HostBatch, rows: list[int]) -> Work:
        chunks = [step.chunks[row] for row in rows]
        work = Work.of(
            host.page_table[rows],
            page_tables([chunk.fresh_pages for chunk in chunks]),
            host.kv_lens[rows],
            [chunk.kept for chunk in chunks],
            window_rows(host, rows, self.method.window),
            self.pool.device,
            [self.layout(chunk.seq.request.compress_at) for chunk in chunks],
            [chunk.seq.seat for chunk in chunks],
        )
        return self.layers.planned(work, host.kv_lens[rows], [c.seq.request.image_spans for c in chunks])

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> None:
        """q: (T, H, d), the step's rotated queries; k, v: (T, Hk, d). What has a slot is in the pool already.
        lse: the backend's."""
        step = Computed(q, k, v, lse, self.states.latest if self.states is not None else None)
        for late in self._late:
            if late.see(step):
                self._measured(late.compress)
        if self.stream is None:
            if self._works:
                self._measured(lambda: self._compress(layer, step))
            return
        hand_over(torch.cuda.current_stream(), self.stream, *step.tensors)
        with torch.cuda.stream(self.stream):
            if self.beside is None:
                self.beside = Span(self.pool.device)
                self.beside.start()
            self._compress(layer, step)

    def _measured(self, work: Callable[[], object]) -> None:
        if not self.timed:
            work()
            return
        self.spans.append(Span(self.pool.device))
        self.spans[-1].start()
        work()
        self.spans[-1].stop()

    def finish(self) -> None:
        """Steps after this one read the fresh pages and reuse the old ones: order them behind the copies."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            if self._late:
                self._measured(lambda: [late.compress() for late in self._late])
            for work in (*(work for work, _ in self._works), *(late.work for late in self._late)):
                if work.shared is not None:
                    work.shared.publish(self.table)
            if self.beside is not None:
                self.beside.stop()
        self._late = []
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
