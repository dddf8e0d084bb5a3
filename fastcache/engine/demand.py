"""How many pages a sequence will need: what admission promises against."""

from __future__ import annotations

from typing import Protocol

from fastcache.core import Sequence
from fastcache.kvcache.head_layout import Layout
from fastcache.kvcache.slots import pages_for


class CompressionPlan(Protocol):
    """What the scheduler must know of a method: numbers only."""

    def tail(self, num_tokens: int) -> int:
        """How many of the last tokens of a context must be computed in one chunk, for the method to see them."""
        ...

    replays: bool
    """The method reads the whole stored context again, so it must be there."""

    def kept(self, num_tokens: int, image_spans: tuple[tuple[int, int], ...] = ()) -> int:
        """Entries the longest KV head keeps of `num_tokens`, of which some are images' (start, length); 0 if the
        method does not apply to that length."""
        ...

    def layout(self, num_tokens: int) -> Layout | None:
        """Where the kept entries go if KV heads keep different numbers of them; None if all keep the same."""
        ...


class PageDemand:
    """Page counts of sequences, compressed or to be compressed.

    Without `immediate_release` a compressed sequence keeps its old pages until its request ends.
    direct_tokens: contexts of up to so many tokens are always compressed in the step that computes them, without
    being stored whole.
    """

    def __init__(
        self,
        page_size: int,
        compression: CompressionPlan | None,
        immediate_release: bool = True,
        direct_tokens: int = 0,
    ) -> None:
        self.page_size, self.compression = page_size, compression
        self.immediate_release, self.direct_tokens = immediate_release, direct_tokens

    def kept(self, seq: Sequence) -> int:
        """Entries kept of a context that is still to be compressed, else 0."""
        if self.compression is None or seq.compressed or seq.leave_whole or not seq.request.compress_at:
            return 0
        return self.compression.kept(seq.request.compress_at, seq.request.image_spans)

    def layout(self, seq: Sequence) -> Layout | None:
        """The layout of a compressed cache with head budgets; None for any other."""
        return self.compression.layout(seq.request.compress_at) if seq.compressed else None

    def pages(self, seq: Sequence, kv_len: int) -> int:
        """Pages that `seq` occupies once its longest head holds `kv_len` entries."""
        return self._pages(self.layout(seq), kv_len)

    def fresh_pages(self, seq: Sequence, kept: int) -> int:
        """Pages for the entries kept of a context that is about to be compressed; none if `kept` is 0."""
        return self._pages(self.compression.layout(seq.request.compress_at), kept) if kept else 0

    def mean_kept(self, seq: Sequence) -> int:
        """Entries that a KV head of the compressed `seq` kept, on average."""
        layout = self.layout(seq)
        if layout is not None:
            return layout.mean
        return self.compression.kept(seq.request.compress_at, seq.request.image_spans)

    def _pages(self, layout: Layout | None, kv_len: int) -> int:
        return pages_for(kv_len, self.page_size) if layout is None else layout.pages(kv_len - layout.longest)

    def tail(self, seq: Sequence) -> int:
        """How many of the last tokens of the context of `seq` must be computed in one chunk."""
        return self.compression.tail(seq.request.compress_at) if self.kept(seq) else 1

    def direct(self, seq: Sequence) -> bool:
        """Whether the context of `seq` is sure to be compressed without being stored whole."""
        always = seq.kv_len == 0 and seq.request.compress_at <= self.direct_tokens
        planned = seq.fresh > 0 and not seq.pages
        return (always or planned) and self.kept(seq) > 0

    def peak(self, seq: Sequence, new_tokens: int) -> int:
        """Most pages `seq` holds at once until it has sampled `new_tokens` more tokens.

        A context that will be compressed needs its full pages and the fresh ones side by side for a moment, unless
        it is never stored whole.
        """
        kept, context = self.kept(seq), seq.request.compress_at
        # The newest sampled token is only stored when it is fed back, and the very last one never is.
        stored = seq.kv_len + seq.num_tokens - seq.num_computed + max(new_tokens - 1, 0)
        if not kept:
            return self.pages(seq, stored)
        layout = self.compression.layout(context)
        old, later = pages_for(context, self.page_size), self._pages(layout, stored - context + kept)
        if not self.immediate_release:
            return old + later
        if self.direct(seq):
            old = 0
        return max(old + self._pages(layout, kept), later)

    def expected(self, seq: Sequence) -> int:
        """Known with `ignore_eos`; else a page ahead, and preemption settles what was guessed too low."""
        left = seq.request.sampling.max_tokens - seq.num_sampled
        return self.peak(seq, left if seq.request.sampling.ignore_eos else min(left, self.page_size))
