"""Compression by a method that repeats the context over its own cache: after the prefill step, before its pages go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from fastcache.compression.adakv import global_counts
from fastcache.compression.kvzip import KVzip
from fastcache.compression.work import Work
from fastcache.core import HostBatch, Step
from fastcache.device.timing import Span
from fastcache.engine.compressor import InlineCompressor
from fastcache.engine.replay import ReplayPrompt, replay_scores
from fastcache.kvcache.head_layout import Layout
from fastcache.kvcache.pool import KVPool
from fastcache.models.llama import Llama


class ReplayCompressor(InlineCompressor):
    """One context after the other: a repetition is a forward pass as long as the context itself, and needs its whole
    cache. It runs in the step's own stream, whose time it is part of."""

    def __init__(
        self,
        method: KVzip,
        pool: KVPool,
        model: Llama,
        prompt: ReplayPrompt,
        layout: Callable[[int], Layout | None],
    ) -> None:
        super().__init__(method, pool, model.config.num_layers, None, layout)
        self.model, self.prompt = model, prompt
        self._contexts: list[tuple[list[int], Work]] = []

    def begin(self, step: Step, host: HostBatch) -> bool:
        self.spans = []
        self._contexts = [
            (chunk.seq.known_tokens[: chunk.seq.request.compress_at], self._work(step, host, [row]))
            for row, chunk in enumerate(step.chunks)
            if chunk.kept
        ]
        return bool(self._contexts)

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None) -> None:
        """Nothing to see yet: what the step stores is read when all its layers are there."""

    def finish(self) -> None:
        self.spans = [Span(self.pool.device)] if self.timed else []
        for span in self.spans:
            span.start()
        self._replay()
        for span in self.spans:
            span.stop()

    def _replay(self) -> None:
        for context, work in self._contexts:
            layers = range(self.pool.shape.num_layers)
            cache = [self.pool.gather(layer, work.table, len(context)) for layer in layers]
            cache = [(keys[0], values[0]) for keys, values in cache]
            scores = replay_scores(
                self.model, context, cache, self.prompt, self.method.n_sink, self.method.chunk_size
            )
            del cache  # as large as the context's pages
            work = self._shared_by_all(work, scores)
            for layer in layers:
                self.layers.stored(layer, work, None, scores[layer][None])
            if work.shared is not None:
                work.shared.publish(self.table)
        self._contexts = []

    def _shared_by_all(self, work: Work, scores: Tensor) -> Work:
        """With one budget for all layers and heads: the same work, with what each got now that all scores are there."""
        if work.shared is None or work.shared.by_layer:
            return work
        counts = global_counts(scores, work.shared.largest_mean * scores[..., 0].numel(), self.method.n_sink)
        work.shared.fill(0, counts.view(1, -1))
        work.shared.publish(self.table)
        largest = (work.max_budget,) * len(scores)
        return dataclasses.replace(work, shared=None, longest=largest)


def replay_positions(prompt: ReplayPrompt, method: KVzip, max_model_len: int) -> int:
    """Positions beyond `max_model_len` that a repetition of the longest context reaches."""
    return prompt.length(min(method.chunk_size, max_model_len))
