"""Who may come in: against the pages that running sequences are expected to need, and with what the prefix cache
already holds of a prompt."""

from __future__ import annotations

from collections.abc import Iterable

from fastcache.core import Sequence
from fastcache.engine.demand import PageDemand
from fastcache.kvcache.pages import PageAllocator
from fastcache.kvcache.prefix import PrefixCache
from fastcache.stats import EngineStats


class Admission:
    """Overload grows the queue, never memory: nothing is admitted on pages that are promised to others."""

    def __init__(self, allocator: PageAllocator, demand: PageDemand, prefix: PrefixCache | None) -> None:
        self.allocator, self.demand, self.prefix = allocator, demand, prefix

    def admit(self, seq: Sequence, running: Iterable[Sequence], stats: EngineStats) -> bool:
        """Whether `seq` fits; if so, it has the pages of the prefix cache that it can share."""
        shared = self._match(seq)
        if not self._fits(seq, running, sum(self.allocator.owners(page) > 0 for page in shared)):
            return False
        if shared:
            self.allocator.share(shared)
            seq.replace_pages(list(shared))
            seq.num_computed = seq.kv_len = len(shared) * self.demand.page_size
            seq.cached_tokens = seq.kv_len
            stats.prefix_hit_tokens += seq.kv_len
        return True

    def _fits(self, seq: Sequence, running: Iterable[Sequence], shared: int) -> bool:
        """`shared`: matched pages somebody owns already; sharing those takes nothing from what is available."""
        want = self.demand.expected(seq) - shared
        if want > self.allocator.available:
            return False
        promised = 0
        for other in running:
            promised += max(0, self.demand.expected(other) - len(other.pages) - other.fresh)
        return want + promised <= self.allocator.available

    def _match(self, seq: Sequence) -> list[int]:
        if self.prefix is None:
            return []
        limit = seq.num_tokens - 1
        if self.demand.kept(seq):
            limit = min(limit, seq.request.compress_at - self.demand.tail(seq))
        if seq.request.logprobs_from is not None:
            limit = min(limit, seq.request.logprobs_from)  # a row that is read has to be computed
        return self.prefix.match(seq.content, limit)

    def register(self, seq: Sequence) -> None:
        """Name the pages of what has been computed of `seq`."""
        if self.prefix is not None and not seq.compressed:
            self.prefix.register(seq.content[: seq.num_computed], seq.pages)
