"""Compression as a stage of its own: which stored contexts are compressed next, and the swap to their fresh pages.

A job reads pages that nobody writes and writes pages that nobody reads. Its sequences neither decode nor give
pages back until it is done; then, at a step boundary, they live on their fresh pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from fastcache.core import Sequence
from fastcache.engine.demand import PageDemand
from fastcache.kvcache.pages import PageAllocator
from fastcache.kvcache.slots import pages_for
from fastcache.stats import EngineStats


@dataclass(frozen=True)
class CompressionJob:
    """A compression of its own: stored contexts `seqs` to `kept` entries each, on `fresh_pages`."""

    seqs: tuple[Sequence, ...]
    kept: tuple[int, ...]
    fresh_pages: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return sum(seq.kv_len for seq in self.seqs)


class CompressStage:
    """Plans jobs and keeps the books of those under way. With `immediate_release` off, a sequence holds its old
    pages until its request ends."""

    def __init__(self, allocator: PageAllocator, demand: PageDemand, immediate_release: bool) -> None:
        self.allocator, self.demand = allocator, demand
        self.immediate_release = immediate_release
        self.jobs: list[CompressionJob] = []
        self._left_behind: dict[Sequence, list[int]] = {}  # pages of sequences that ended while under way

    def plan(self, running: Iterable[Sequence], max_seqs: int | None) -> CompressionJob | None:
        """The oldest pending contexts, as many as have room for their fresh pages; None if there is none."""
        chosen, free = [], self.allocator.available
        for seq in running:
            if not seq.to_compress or seq.under_way:
                continue
            free -= self.demand.fresh_pages(seq, seq.to_compress)
            if free < 0 or len(chosen) == max_seqs:
                break
            chosen.append(seq)
        if not chosen:
            return None
        kept = tuple(seq.to_compress for seq in chosen)
        needed = [self.demand.fresh_pages(seq, seq.to_compress) for seq in chosen]
        fresh = tuple(tuple(self.allocator.allocate(count)) for count in needed)
        return CompressionJob(tuple(chosen), kept, fresh)

    def launched(self, job: CompressionJob, stats: EngineStats) -> None:
        self.jobs.append(job)
        stats.compress_steps += 1
        for seq in job.seqs:
            seq.under_way = True

    def finished(self, job: CompressionJob, stats: EngineStats, now_s: float) -> None:
        """The job's copies are complete. To be called between two steps."""
        self.jobs.remove(job)
        for seq, kept, fresh in zip(job.seqs, job.kept, job.fresh_pages, strict=True):
            if not self.abandoned(seq, fresh):
                self.swap(seq, kept, fresh, stats)
                seq.ready_s = now_s

    def abandoned(self, seq: Sequence, fresh: Many[int]) -> bool:
        """What `seq` was part of is complete. Whether it ended meanwhile: then nothing uses its pages from here on."""
        seq.under_way = False
        if seq not in self._left_behind:
            return False
        self.allocator.free(self._left_behind.pop(seq))
        self.allocator.free(fresh)
        return True

    def swap(self, seq: Sequence, kept: int, fresh: Many[int], stats: EngineStats) -> None:
        """From here on the sequence lives on its fresh pages. Later steps are ordered behind the copies."""
        old, seq.kv_len_before = seq.pages, seq.kv_len
        seq.replace_pages(list(fresh))
        seq.kv_len, seq.compressed, seq.to_compress, seq.fresh = kept, True, 0, 0
        seq.kv_len_after = self.demand.mean_kept(seq)
        stats.compressed_sequences += 1
        if not self.immediate_release:
            seq.held = old
            return
        self.allocator.free(old)
        # Pages that the whole context would take count as freed, whether it was stored or not.
        seq.pages_freed = pages_for(seq.kv_len_before, self.demand.page_size) - len(fresh)
        stats.pages_freed += seq.pages_freed

    def release(self, seq: Sequence) -> None:
        """Give back all pages of a sequence that ends; while something under way uses them, when that is done."""
        if seq.under_way:
            self._left_behind[seq] = seq.pages
        else:
            self.allocator.free(seq.pages)
        self.allocator.free(seq.held)
        seq.held = []
        seq.replace_pages([])
