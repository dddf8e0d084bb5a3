"""One layer's compression, from scores to fresh pages: what the engine calls, inside a prefill or after it."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fastcache.compression import observe
from fastcache.compression.adakv import adaptive_counts
from fastcache.compression.base import EvictionMethod, LayerKV
from fastcache.compression.kernels import kernels_for
from fastcache.compression.repack import repack_packed
from fastcache.compression.transform import Spans
from fastcache.compression.work import Computed, Packed, Rotation, Work
from fastcache.kvcache.head_layout import HeadRows
from fastcache.kvcache.pool import KVPool

# What only the prefill itself can tell, and only about a context whose queries are all computed in one step.
NEEDS_ALL_QUERIES = frozenset({"attention_mass", "query_stats"})
# What is the same for one sequence in two layers as for two sequences in one.
NEEDS_NO_LAYER = frozenset({"keys", "values", "window_queries", "hidden_states"}) | NEEDS_ALL_QUERIES
# Keys that are read at once: a few layers of long contexts, all of them of short ones.
BYTES_AT_ONCE = 2**28
# What layers of a step that wait for each other may hold, with what compressing them together takes. The pool is sized
# with it in mind (`engine.memory`).
WAITING_BYTES = 3 * 2**29


class LayerCompressor:
    """Scores, selects and repacks one layer of n sequences at once. rotation: for methods that need query_stats."""

    def __init__(
        self, method: EvictionMethod, pool: KVPool, num_layers: int, rotation: Rotation | None
    ) -> None:
        self.method, self.pool, self.num_layers, self.rotation = method, pool, num_layers, rotation
        self.kernels = kernels_for(pool.device)

    @property
    def merges_layers(self) -> bool:
        """Whether layers can be compressed together where heads have no budgets of their own."""
        return not self.method.by_layer and self.method.needs <= NEEDS_NO_LAYER

    @cached_property
    def _merged(self) -> LayerCompressor:
        merged = LayerCompressor(self.method, self.pool.as_one_layer(), 1, self.rotation)
        merged.kernels = self.kernels
        return merged

    def planned(self, work: Work, lengths: Many[int], image_spans: Many[Spans]) -> Work:
        """An eviction needs to know no more of its sequences than `work` says."""
        return work

    def stored(self, layer: int, work: Work, queries: Tensor | None, replayed: Tensor | None = None) -> None:
        """Contexts out of their pages. queries: (n, H, w, d), replayed: (n, Hk, T), for methods that need them."""
        needs, pool = self.method.needs, self.pool
        where = layer, work.table, work.max_length
        keys = pool.gather_keys(*where) if "keys" in needs else pool.shaped(len(work.table), work.max_length)
        values = pool.gather_values(*where) if "values" in needs else None
        seen = {"window_queries": queries, "replay_scores": replayed}
        if "hidden_states" in needs:
            seen["ratings"] = pool.gather_ratings(*where)
        heads, kept = self._kept(layer, work, keys, values, seen)
        if heads is None:
            self.kernels.repack_pages(pool, layer, work.table, kept, work.fresh)
        else:
            self.kernels.repack_heads_pages(pool, heads, work.table, kept, work.fresh)

    def stored_all(self, work: Work, queries: Many[Tensor]) -> None:
        """All layers as `stored`, in as few launches as memory allows. queries: by layer (n, w, H, d), or none."""
        layers, pool = self.num_layers, self.pool
        if not self.merges_layers or work.layouts is not None:
            for layer in range(layers):
                self.stored(layer, work, queries[layer].transpose(1, 2) if queries else None)
            return
        entry = pool.shape.layer_bytes // 2
        at_once = max(1, BYTES_AT_ONCE // (len(work.table) * work.max_length * entry))
        for first in range(0, layers, at_once):
            part = range(first, min(first + at_once, layers))
            seen = torch.cat(queries[part.start : part.stop]).transpose(1, 2) if queries else None
            self._merged.stored(0, work.across(part, pool.num_pages), seen)

    def waiting(self, work: Work, step: Computed) -> int:
        """How many layers, each with a step like this, may wait for each other: `WAITING_BYTES` of them."""
        n, num_tokens, (heads, size) = len(work.table), len(step.k), step.q.shape[1:]
        copied = (
            sum(x.nbytes for x in self._read(step).tensors) // num_tokens
        )  # in a row behind others, and padded
        each = sum(x.nbytes for x in step.tensors) + copied * (num_tokens + n * work.max_length)
        if "query_stats" in self.method.needs:
            each += 2 * n * heads * size**2 * torch.float32.itemsize  # shares of moments, and the covariance
        if "attention_mass" in self.method.needs and self.kernels.attention_mass is observe.attention_mass:
            each += observe.weight_bytes(n, heads, work.max_length)
        return max(1, WAITING_BYTES // each)

    def packed_all(
        self, layers: range, work: Work, where: Packed, steps: Many[Computed], queries: Many[Tensor]
    ) -> None:
        """`layers` as `packed`, at once; only where layers merge. steps: theirs. queries: as in `stored_all`."""
        seen = torch.cat(list(queries)).transpose(1, 2) if queries else None
        work_across = work.across(layers, self.pool.num_pages)
        where_across = where.across(len(layers), len(steps[0].k), work.max_length)
        step = Computed.across([self._read(each) for each in steps])
        self._merged.packed(0, work_across, where_across, step, seen)

    def _read(self, step: Computed) -> Computed:
        """What of `step` is read: all its queries only where a method must see them."""
        return step if self.method.needs & NEEDS_ALL_QUERIES else replace(step, q=None, lse=None)

    def packed(self, layer: int, work: Work, where: Packed, step: Computed, queries: Tensor | None) -> None:
        """Contexts out of what the step has computed."""
        needs, longest, k, v = self.method.needs, work.max_length, step.k, step.v
        keys = where.padded(k, longest) if "keys" in needs else where.shaped(k, longest)
        values = where.padded(v, longest) if "values" in needs else None
        seen = {"window_queries": queries, **self._observed(work, where, step)}
        if step.ratings is not None:
            seen["ratings"] = where.padded(step.ratings[..., None], longest)[..., 0]
        heads, kept = self._kept(layer, work, keys, values, seen)
        if heads is not None:
            keys, values = where.padded(k, longest), where.padded(v, longest)
            self.kernels.repack_heads(self.pool, heads, keys, values, kept, work.fresh)
        elif self.kernels.repack is None:
            repack_packed(self.pool, layer, k, v, where.starts, kept, work.fresh)
        else:
            pages = self.pool.keys[layer], self.pool.values[layer]
            self.kernels.repack(*pages, k, v, where.starts, kept, work.fresh)

    def _observed(self, work: Work, where: Packed, step: Computed) -> dict[str, Tensor]:
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
        budgets, largest, shared = work.budgets, work.max_budget, work.shared
        if shared is not None:
            budgets = shared.means
        elif heads is not None:
            budgets, largest = heads.kept, work.longest[layer]
        view = LayerKV(layer, self.num_layers, keys, values, work.lengths, budgets, **seen)
        scores = self.kernels.score(self.method, view)
        if shared is not None:
            select = self.kernels.select
            budgets = adaptive_counts(scores, work.lengths, shared.means, shared.largest_mean, select)
            shared.fill(layer, budgets)
            heads = HeadRows(work.layouts, layer, keys.shape[1])
        return heads, self.kernels.select(scores, work.lengths, budgets, largest)
