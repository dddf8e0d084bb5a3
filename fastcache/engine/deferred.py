"""Compression after prefill: what a method must have seen is kept, and the copies run when the scheduler says.

With a stream of its own a job runs beside decode steps. It reads pages nobody writes and writes pages nobody
reads; the scheduler swaps page tables once its event has passed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod
from fastcache.compression.transform import BoundTransform
from fastcache.compression.work import Work, page_tables, to_device, window_rows
from fastcache.core import HostBatch, Sequence, Step
from fastcache.device.streams import hand_over
from fastcache.device.timing import Span
from fastcache.engine.compress_stage import CompressionJob
from fastcache.engine.compressor import layers_of
from fastcache.kvcache.head_layout import Layout
from fastcache.kvcache.pool import KVPool

# What can be kept of a prefill at a price that is worth it: pages stay anyway, ratings of hidden states with them, and
# a window of queries is small.
DEFERRABLE_NEEDS = frozenset({"keys", "values", "window_queries", "hidden_states"})


@dataclass(frozen=True)
class LaunchedJob:
    """A job on its way. `ready` None: later steps are ordered behind it, so its pages count as swapped at once."""

    job: CompressionJob
    ready: torch.cuda.Event | None
    span: Span
    tokens: int

    def done(self) -> bool:
        return self.ready is None or self.ready.query()

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


@dataclass(frozen=True)
class _Seen:
    """The window queries of one step: per layer (n, w, H, d), of which `row` is this sequence's."""

    layers: list[Tensor]
    row: int


class DeferredCompressor:
    """`layer` is called inside a prefill that defers, `launch` for each job."""

    reads_later = False  # as in `InlineCompressor`: what `layer` keeps is a copy

    def __init__(
        self,
        method: EvictionMethod | BoundTransform,
        pool: KVPool,
        num_layers: int,
        stream: torch.cuda.Stream | None = None,
        layout: Callable[[int], Layout | None] = lambda num_tokens: None,
    ) -> None:
        self.method, self.pool, self.num_layers, self.layout = method, pool, num_layers, layout
        self.layers = layers_of(method, pool, num_layers, None)
        self.stream = stream
        self._rows: Tensor | None = None
        self._layers: list[Tensor] = []
        self._seen: dict[Sequence, _Seen] = {}

    def begin(self, step: Step, host: HostBatch) -> bool:
        """Note whose queries must be kept; False if the step defers nothing or the method sees only pages."""
        rows = [row for row, chunk in enumerate(step.chunks) if chunk.defer]
        if not rows or "window_queries" not in self.method.needs:
            return False
        self._rows = to_device(window_rows(host, rows, self.method.window), self.pool.device)
        self._layers = []
        for place, row in enumerate(rows):
            self._seen[step.chunks[row].seq] = _Seen(self._layers, place)
        return True

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> None:
        """q: (T, H, d), the step's rotated queries; its keys and values are stored."""
        self._layers.append(q[self._rows])

    def finish(self) -> None:
        self._rows = None

    def forget(self, seq: Sequence) -> None:
        """It will not be compressed: it ended, or will be computed again."""
        self._seen.pop(seq, None)

    def launch(self, job: CompressionJob) -> LaunchedJob:
        """Score, select and copy, all sequences of the job at once. Does not wait."""
        device = self.pool.device
        main = torch.cuda.current_stream() if self.stream is not None else None
        work = self._work(job)
        seen = [self._seen.pop(seq) for seq in job.seqs] if "window_queries" in self.method.needs else []
        crossing = [work.layouts] if work.layouts is not None else []
        crossing += work.plan.tensors if work.plan is not None else []
        crossing += [layer for each in seen for layer in each.layers]
        hand_over(main, self.stream, work.table, work.fresh, work.lengths, work.budgets, *crossing)
        span = Span(device)
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            span.start()
            self.copy(work, seen)
            span.stop()
            ready = None
            if self.stream is not None:
                ready = torch.cuda.Event()
                ready.record()
        return LaunchedJob(job, ready, span, job.num_tokens)

    def copy(self, work: Work, seen: list[_Seen]) -> None:
        layers = range(self.num_layers) if seen else ()
        queries = [torch.stack([each.layers[layer][each.row] for each in seen]) for layer in layers]
        self.layers.stored_all(work, queries)

    def _work(self, job: CompressionJob) -> Work:
        lengths = [seq.kv_len for seq in job.seqs]
        work = Work.of(
            page_tables([seq.pages for seq in job.seqs]),
            page_tables(job.fresh_pages),
            lengths,
            list(job.kept),
            None,
            self.pool.device,
            [self.layout(seq.request.compress_at) for seq in job.seqs],
        )
        return self.layers.planned(work, lengths, [seq.request.image_spans for seq in job.seqs])
