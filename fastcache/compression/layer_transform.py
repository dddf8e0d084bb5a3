"""One layer's cache to its new entries: what the engine calls of a transform, inside a prefill or after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many

import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.base import LayerKV
from fastcache.compression.transform import BoundTransform, Spans
from fastcache.compression.work import Computed, Packed, Work
from fastcache.kvcache.pool import KVPool


class LayerTransformer:
    """Makes and stores the new entries of one layer, n sequences at once; the counterpart of `LayerCompressor`."""

    merges_layers = False  # as in `LayerCompressor`

    def __init__(self, method: BoundTransform, pool: KVPool, num_layers: int) -> None:
        self.method, self.pool, self.num_layers = method, pool, num_layers

    def planned(self, work: Work, lengths: Many[int], image_spans: Many[Spans]) -> Work:
        """`work` with the plan that its sequences share in all layers."""
        return dataclasses.replace(work, plan=self.method.plan([int(n) for n in lengths], image_spans))

    def stored(self, layer: int, work: Work, queries: None, replayed: None = None) -> None:
        """Contexts out of their pages."""
        self._store(layer, work, *self.pool.gather(layer, work.table, work.max_length))

    def stored_all(self, work: Work, queries: Many[Tensor]) -> None:
        """All layers as `stored`: each has networks of its own."""
        for layer in range(self.num_layers):
            self.stored(layer, work, None)

    def packed(self, layer: int, work: Work, where: Packed, step: Computed, queries: None) -> None:
        """Contexts out of what the step has computed."""
        self._store(layer, work, where.padded(step.k, work.max_length), where.padded(step.v, work.max_length))

    def _store(self, layer: int, work: Work, keys: Tensor, values: Tensor) -> None:
        kv = LayerKV(layer, self.num_layers, keys, values, work.lengths, work.budgets)
        pages = self.pool.keys[layer], self.pool.values[layer]
        if self.method.transform_into(kv, work.plan, pages, work.fresh):
            return
        room = work.fresh.shape[1] * self.pool.page_size
        new = (F.pad(x, (0, 0, 0, room - x.shape[2])) for x in self.method.transform(kv, work.plan))
        self.pool.write_kept(layer, *new, work.fresh)
