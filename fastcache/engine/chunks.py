"""One sequence's share of a step: how many tokens, where they are stored, whether compression follows."""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.core import Chunk, Sequence
from fastcache.engine.demand import PageDemand
from fastcache.kvcache.pages import PageAllocator


@dataclass(frozen=True)
class Limits:
    """Per step: tokens computed and sequences running at once. page_size in slots."""

    max_num_batched_tokens: int
    max_num_seqs: int
    page_size: int


class Chunks:
    """Cuts chunks and gives them their pages.

    direct: a context that one chunk computes whole is compressed out of it, and only what stays gets pages.
    """

    def __init__(self, limits: Limits, allocator: PageAllocator, demand: PageDemand, direct: bool) -> None:
        self.limits, self.allocator, self.demand, self.direct = limits, allocator, demand, direct

    def prefill(self, seq: Sequence, budget: int, cut: bool, defer: bool) -> Chunk | None:
        """The next piece of an unfinished prefill, its pages allocated; None if there is none that fits.

        Without `cut` a prompt that a step of its own could hold whole waits for that step. `defer`: its
        compression is not part of this step, only what the method needs to see is kept.
        """
        if seq.decoding or seq.to_compress or seq.under_way:
            return None
        kept, tail = self.demand.kept(seq), self.demand.tail(seq)
        target = seq.request.compress_at if kept else seq.num_tokens
        left = target - seq.num_computed
        if left > budget and not cut and left <= self.limits.max_num_batched_tokens:
            return None
        length = min(left, budget)
        if 0 < left - length < tail:
            length = left - tail  # the method must see all that it looks at in one chunk
        defer = kept > 0 and length == left and defer
        if length < left or defer:
            kept = 0
        fresh = self.demand.fresh_pages(seq, kept)
        stored = not (self.direct and kept > 0 and seq.kv_len == 0)
        missing = self.missing(seq, length) if stored else 0
        if length <= 0 or missing + fresh > self.allocator.available:
            return None
        if stored:
            self._extend(seq, length)
        seq.fresh = fresh
        return Chunk(
            seq,
            start=seq.num_computed,
            kv_start=seq.kv_len,
            length=length,
            sample=seq.num_computed + length == seq.num_tokens,
            kept=kept,
            fresh_pages=tuple(self.allocator.allocate(fresh)),
            defer=defer,
            stored=stored,
        )

    def decode(self, seq: Sequence) -> Chunk:
        """The newest token of `seq`. The caller has checked that a page is there if one is missing."""
        self._extend(seq, 1)
        return Chunk(seq, seq.num_computed, seq.kv_len, 1, sample=True)

    def missing(self, seq: Sequence, more: int) -> int:
        """Pages that `more` stored entries take beyond those that `seq` has."""
        return self.demand.pages(seq, seq.kv_len + more) - len(seq.pages)

    def _extend(self, seq: Sequence, more: int) -> None:
        missing = self.missing(seq, more)
        if missing > 0:
            seq.pages.extend(self.allocator.allocate(missing))
