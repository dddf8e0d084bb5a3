"""Which sequences the next step computes, and on which pages. Knows counts and page numbers, no tensors.

Prefill comes first and is cut into chunks that fit the token budget; otherwise every running sequence decodes
one token. `schedule` plans a step against the current state, `commit` advances the state once the step has
been launched, `complete` delivers the sampled tokens, one step later. Work is planned by counts, so a step
can be planned before the previous one's tokens are known to the host.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fastcache.core import Chunk, EngineStats, Sequence, Step
from fastcache.engine.demand import CompressionPlan, PageDemand
from fastcache.kvcache.pages import PageAllocator
from fastcache.kvcache.prefix import PrefixCache
from fastcache.kvcache.slots import pages_for


@dataclass(frozen=True)
class Limits:
    """Per step: tokens computed and sequences running at once. page_size in slots."""

    max_num_batched_tokens: int
    max_num_seqs: int
    page_size: int


class Drain(Exception):
    """Pages ran out while tokens are in flight: deliver those first, then schedule again."""


class Scheduler:
    """Continuous batching over one page pool, first come first served, preemption by recomputation."""

    def __init__(
        self,
        limits: Limits,
        allocator: PageAllocator,
        stats: EngineStats,
        prefix: PrefixCache | None = None,
        compression: CompressionPlan | None = None,
    ) -> None:
        self.limits, self.allocator, self.stats = limits, allocator, stats
        self.prefix, self.compression = prefix, compression
        self.demand = PageDemand(limits.page_size, compression)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission; prefilling ones included
        self._seats = list(range(limits.max_num_seqs - 1, -1, -1))
        self.in_flight = 0  # launched steps whose tokens have not been delivered

    def _pages(self, kv_len: int) -> int:
        return pages_for(kv_len, self.limits.page_size)

    def _fits(self, seq: Sequence, shared: int) -> bool:
        """Whether `seq` can be admitted without taking what the running sequences are expected to need."""
        want = self.demand.expected(seq) - shared
        if want > self.allocator.available:
            return False
        promised = sum(max(0, self.demand.expected(other) - len(other.pages)) for other in self.running)
        return want + promised <= self.allocator.available

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.in_flight)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can be computed before tokens in flight arrive.

        Raises `Drain` when pages ran out and delivering tokens in flight may free some.
        """
        step = self._prefill() or self._decode()
        if step is None and self.running and not self.in_flight:
            # Only unfinished prefills are left and each waits for pages another one holds.
            assert len(self.running) > 1, "a sequence that was admitted alone does not fit"
            self._preempt(self.running[-1])
            return self.schedule()
        return step

    def _prefill(self) -> Step | None:
        budget, chunks = self.limits.max_num_batched_tokens, []
        for seq in self.running:
            if budget > 0 and (chunk := self._next_chunk(seq, budget, split=not chunks)):
                chunks.append(chunk)
                budget -= chunk.length
        while self.waiting and budget > 0 and self._seats:
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            chunk = self._next_chunk(seq, budget, split=not chunks)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.length
        return Step(tuple(chunks), decode=False) if chunks else None

    def _admit(self, seq: Sequence) -> bool:
        shared = self._match_prefix(seq)
        if not self._fits(seq, 0 if self.prefix is None else self._owned(shared)):
            return False
        if shared:
            self.allocator.share(shared)
            seq.replace_pages(list(shared))
            seq.num_computed = seq.kv_len = len(shared) * self.limits.page_size
            seq.cached_tokens = seq.kv_len
            self.stats.prefix_hit_tokens += seq.kv_len
        seq.seat = self._seats.pop()
        self.running.append(self.waiting.popleft())
        self.stats.peak_running = max(self.stats.peak_running, len(self.running))
        return True

    def _owned(self, pages: list[int]) -> int:
        """Matched pages somebody owns already: sharing those takes nothing from what is available."""
        return sum(self.allocator.owners(page) > 0 for page in pages)

    def _match_prefix(self, seq: Sequence) -> list[int]:
        if self.prefix is None:
            return []
        limit = seq.num_tokens - 1
        if self.demand.kept(seq):
            limit = min(limit, seq.request.compress_at - self.compression.tail)
        return self.prefix.match(seq.content, limit)

    def _next_chunk(self, seq: Sequence, budget: int, split: bool) -> Chunk | None:
        """The next piece of an unfinished prefill, its pages allocated; None if there is none that fits.

        Without `split` a prompt that a step of its own could hold whole waits for that step.
        """
        if seq.decoding:
            return None
        kept, target, tail = self.demand.kept(seq), seq.num_tokens, 0
        if kept:
            target, tail = seq.request.compress_at, self.compression.tail
        left = target - seq.num_computed
        if left > budget and not split and left <= self.limits.max_num_batched_tokens:
            return None
        length = min(left, budget)
        if 0 < left - length < tail:
            length = left - tail  # the method must see its whole window in one chunk
        if length < left:
            kept = 0
        fresh = self._pages(kept)
        missing = self._pages(seq.kv_len + length) - len(seq.pages)
        if length <= 0 or missing + fresh > self.allocator.available:
            return None
        self._extend(seq, seq.kv_len + length)
        return Chunk(
            seq,
            start=seq.num_computed,
            kv_start=seq.kv_len,
            length=length,
            sample=seq.num_computed + length == seq.num_tokens,
            kept=kept,
            fresh_pages=tuple(self.allocator.allocate(fresh)),
        )

    def _extend(self, seq: Sequence, kv_len: int) -> None:
        missing = self._pages(kv_len) - len(seq.pages)
        if missing > 0:
            seq.pages.extend(self.allocator.allocate(missing))

    def _decode(self) -> Step | None:
        ready = [seq for seq in self.running if seq.decoding and not seq.exhausted]
        chunks = []
        for seq in ready:
            if seq.seat < 0:
                continue  # preempted below, on behalf of an earlier sequence
            if self._pages(seq.kv_len + 1) > len(seq.pages) and not self._make_room(seq, chunks):
                continue
            self._extend(seq, seq.kv_len + 1)
            chunks.append(Chunk(seq, seq.num_computed, seq.kv_len, 1, sample=True))
        chunks = [chunk for chunk in chunks if chunk.seq.seat >= 0]
        return Step(tuple(chunks), decode=True) if chunks else None

    def _make_room(self, seq: Sequence, planned: list[Chunk]) -> bool:
        """A page for `seq`, by preempting the latest admitted sequences; False if `seq` itself had to go."""
        while self.allocator.available < 1:
            if self.in_flight:
                raise Drain
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Give everything back; it will be recomputed, sampled tokens included, when it is admitted again."""
        self._release(seq)
        seq.num_computed = seq.kv_len = 0
        seq.compressed = seq.decoding = False
        seq.preemptions += 1
        self.stats.preemptions += 1
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._seats.append(seq.seat)
        seq.seat = -1
        self.allocator.free(seq.pages)
        seq.replace_pages([])

    def commit(self, step: Step, now_s: float) -> None:
        """The step is on its way to the device: advance counts, swap compressed page tables."""
        self.in_flight += 1
        if step.decode:
            self.stats.decode_steps += 1
            self.stats.decode_tokens += len(step.chunks)
        else:
            self.stats.prefill_steps += 1
            self.stats.prefill_tokens += step.num_tokens
        for chunk in step.chunks:
            seq = chunk.seq
            seq.num_computed += chunk.length
            seq.kv_len += chunk.length
            if seq.scheduled_s is None:
                seq.scheduled_s = now_s
            if not step.decode:
                self._register(seq)
            if chunk.kept:
                self._swap(chunk)
            elif self.compression and not step.decode and seq.num_computed == seq.request.compress_at:
                self.stats.too_short_to_compress += 0 if seq.compressed else 1
            if chunk.sample:
                seq.num_sampled += 1
                seq.decoding = True

    def _swap(self, chunk: Chunk) -> None:
        """From here on the sequence lives on its fresh pages. Later steps are ordered behind this one."""
        seq = chunk.seq
        old, seq.kv_len_before = seq.pages, seq.kv_len
        seq.replace_pages(list(chunk.fresh_pages))
        self.allocator.free(old)
        seq.kv_len = seq.kv_len_after = chunk.kept
        seq.compressed = True
        seq.pages_freed = len(old) - len(chunk.fresh_pages)
        self.stats.compressed_sequences += 1
        self.stats.pages_freed += seq.pages_freed

    def _register(self, seq: Sequence) -> None:
        if self.prefix is not None and not seq.compressed:
            self.prefix.register(seq.content[: seq.num_computed], seq.pages)

    def complete(self, step: Step, tokens: list[int], eos: frozenset[int], now_s: float) -> list[Sequence]:
        """Deliver the step's sampled tokens, in the order of its sampling chunks; returns who finished."""
        self.in_flight -= 1
        finished = []
        sampling = [chunk.seq for chunk in step.chunks if chunk.sample]
        for seq, token in zip(sampling, tokens, strict=True):
            if seq.finish_reason is not None:
                continue  # it stopped one step ago; this token was computed before anybody knew
            seq.output_ids.append(token)
            seq.token_times_s.append(now_s)
            if token in eos and not seq.request.sampling.ignore_eos:
                seq.finish_reason = "stop"
            elif len(seq.output_ids) >= seq.request.sampling.max_tokens:
                seq.finish_reason = "length"
            if seq.finish_reason is not None:
                self._release(seq)
                finished.append(seq)
        return finished

    def cancel(self, seq: Sequence) -> None:
        """Forget a sequence; its pages are free at once. Tokens of it still in flight are dropped."""
        seq.finish_reason = "cancelled"
        if seq in self.running:
            self._release(seq)
        else:
            self.waiting.remove(seq)
