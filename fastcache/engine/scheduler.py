"""Which sequences the next step computes, and on which pages. Knows counts and page numbers, no tensors.

A stage policy (stages.py) says whose turn it is; this file says what that takes. Prompts are cut into chunks that
fit the token budget, decoding sequences get one token each, in steps of their own or behind a step's prefill
chunks. `schedule` plans a step against the current state, `commit` advances the state once the step has
been launched, `complete` delivers the sampled tokens, one step later. Work is planned by counts, so a step
can be planned before the previous one's tokens are known to the host.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable

from fastcache.core import Chunk, Sequence, Step
from fastcache.engine.admission import Admission
from fastcache.engine.chunks import Chunks, Limits
from fastcache.engine.compress_stage import CompressionJob, CompressStage
from fastcache.engine.deadlines import Deadlines
from fastcache.engine.demand import CompressionPlan, PageDemand
from fastcache.engine.kv_account import KVAccount
from fastcache.engine.policy import AFTER
from fastcache.engine.queues import Queues
from fastcache.engine.stages import COMPRESS, DECODE, PREFILL, PrefillFirst, StagePolicy, Turn
from fastcache.engine.tuner import Tuner
from fastcache.kvcache.pages import PageAllocator
from fastcache.kvcache.prefix import PrefixCache
from fastcache.stats import EngineStats

# When no stage that the policy names can run: whatever can, nearest to the end first.
ANYTHING = (Turn(DECODE), Turn(COMPRESS), Turn(PREFILL))


class Drain(Exception):
    """Pages ran out while tokens or compressed pages are on their way: receive those first, then schedule again."""


class Scheduler:
    """Continuous batching over one page pool, first come first served within a stage, preemption by recomputation."""

    def __init__(
        self,
        limits: Limits,
        allocator: PageAllocator,
        stats: EngineStats,
        prefix: PrefixCache | None = None,
        compression: CompressionPlan | None = None,
        policy: StagePolicy | None = None,
        immediate_release: bool = True,
        tuner: Tuner | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limits, self.allocator, self.stats, self._clock = limits, allocator, stats, clock
        self.prefix, self.compression, self.tuner = prefix, compression, tuner
        self.policy = policy or PrefillFirst()
        # The prefix cache names whole pages and late release is about them, so then they must be there.
        replays = compression is not None and compression.replays
        direct = prefix is None and immediate_release and not replays
        defers = self.policy.deferred or (tuner is not None and tuner.may_defer)
        whole = direct and not (defers or self.policy.cuts_prompts)
        direct_tokens = limits.max_num_batched_tokens if whole else 0
        self.demand = PageDemand(limits.page_size, compression, immediate_release, direct_tokens)
        self.admission = Admission(allocator, self.demand, prefix)
        self.chunks = Chunks(limits, allocator, self.demand, direct)
        self.stage = CompressStage(allocator, self.demand, immediate_release)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission; prefilling ones included
        self.queues = Queues(self.policy.by_age)
        self.deadlines = Deadlines()
        self._account = KVAccount()
        self._seats = list(range(limits.max_num_seqs - 1, -1, -1))
        self._refused = False  # the first waiting request found too few pages
        self.in_flight = 0  # launched steps whose tokens have not been delivered

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.in_flight or self.stage.jobs)

    def add(self, seq: Sequence) -> None:
        seq.ready_s = seq.request.arrival_s
        self.deadlines.add(seq)
        self.waiting.append(seq)

    def schedule(self) -> Step | CompressionJob | None:
        """The next piece of work, or None when nothing can be done before what is in flight arrives.

        Raises `Drain` when pages ran out and what is in flight may free some.
        """
        now_s, limit = self._clock(), self.limits.max_num_batched_tokens
        self._account.sample(self.stats.kv, now_s, self.running, len(self.waiting))
        blocked = bool(self.waiting) and (self._refused or len(self.waiting) > len(self._seats))
        more = 0 if self._refused else min(len(self.waiting), len(self._seats))
        at_once = len(self.running) + more
        load = self.queues.load(now_s, self.running, self.waiting, limit, blocked, at_once)
        for turn in (*self.policy.turns(load), *ANYTHING):
            if (work := self._take(turn)) is not None:
                return work
        if self.running and not self.in_flight and not self.stage.jobs:
            # Only unfinished prefills and compressions are left, and each waits for pages another one holds.
            assert len(self.running) > 1, "a sequence that was admitted alone does not fit"
            self._preempt(self.running[-1])
            return self.schedule()
        return None

    def _take(self, turn: Turn) -> Step | CompressionJob | None:
        if turn.stage == PREFILL:
            return self._prefill(turn)
        if turn.stage == COMPRESS:
            return self.stage.plan(self.queues.early(), turn.max_seqs)
        chunks = self._decode(turn.max_seqs)
        return Step(tuple(chunks), decode=True) if chunks else None

    def _prefill(self, turn: Turn) -> Step | None:
        early = self.queues.early()
        unfinished = (seq for seq in early if not seq.to_compress)
        tail = max(map(self.demand.tail, (*unfinished, *itertools.islice(self.waiting, 1))), default=1)
        limit, riders, chunks = self.limits.max_num_batched_tokens, [], []
        if turn.together:
            riders = self._decode(limit - tail)
        budget = min(limit - len(riders), max(turn.max_tokens or limit, tail))
        place = self.tuner.place() if self.tuner and self.compression else None
        defer = self.policy.deferred or (place is not None and place.startswith(AFTER))
        for seq in self.queues.early():  # anew: one may have made room for those who ride
            if len(chunks) == turn.max_seqs or budget <= 0:
                break
            if chunk := self.chunks.prefill(seq, budget, split=turn.split or not chunks, defer=defer):
                chunks.append(chunk)
                budget -= chunk.length
        while self.waiting and budget > 0 and self._seats and len(chunks) != turn.max_seqs:
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            chunk = self.chunks.prefill(seq, budget, split=turn.split or not chunks, defer=defer)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.length
        if not chunks:
            return Step(tuple(riders), decode=True) if riders else None
        # What reads stored entries comes first: then a backend has at most two runs of sequences to attend.
        chunks.sort(key=lambda chunk: chunk.kv_start == 0)
        step = Step((*chunks, *riders), decode=False, decode_rows=len(riders), place=place)
        if self.tuner is not None:
            self.tuner.taken(step)
        return step

    def _admit(self, seq: Sequence) -> bool:
        if self.tuner is not None:
            seq.leave_whole = False
            sharing = len(self.running) + len(self.waiting)
            self.tuner.admit(seq, self.demand.kept(seq), sharing)
        self._refused = not self.admission.admit(seq, self.running, self.stats)
        if self._refused:
            return False
        if self.tuner is not None:
            self.tuner.admitted()
        seq.seat = self._seats.pop()
        self.running.append(self.waiting.popleft())
        self.queues.admitted(seq)
        self.stats.peak_running = max(self.stats.peak_running, len(self.running))
        return True

    def _decode(self, max_seqs: int | None) -> list[Chunk]:
        """One token for each sequence that can take one, at most `max_seqs`, the longest admitted first."""
        chunks = []
        for seq in self.queues.decoding(self.running)[:max_seqs]:
            if seq.seat < 0:
                continue  # preempted below, on behalf of an earlier sequence
            if self.chunks.missing(seq, 1) > self.allocator.available and not self._make_room(seq):
                continue
            chunks.append(self.chunks.decode(seq))
        return [chunk for chunk in chunks if chunk.seq.seat >= 0]

    def _make_room(self, seq: Sequence) -> bool:
        """A page for `seq`, by preempting the latest admitted sequences; False if `seq` itself had to go."""
        while self.allocator.available < 1:
            if self.in_flight or self.stage.jobs:
                raise Drain
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Give everything back; it will be recomputed, sampled tokens included, when it is admitted again."""
        self._release(seq)
        seq.num_computed = seq.kv_len = seq.to_compress = 0
        seq.compressed = seq.decoding = False
        seq.logprobs.clear()
        seq.preemptions += 1
        self.stats.preemptions += 1
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.queues.left(seq)
        self._seats.append(seq.seat)
        seq.seat = -1
        self.stage.release(seq)

    def commit(self, step: Step, now_s: float) -> None:
        """The step is on its way to the device: advance counts, swap compressed page tables."""
        self.in_flight += 1
        self.stats.count(step)
        decode_from = len(step.chunks) - step.decode_tokens
        for i, chunk in enumerate(step.chunks):
            seq = chunk.seq
            seq.num_computed += chunk.length
            seq.kv_len += chunk.length
            seq.ready_s = now_s
            if seq.scheduled_s is None:
                seq.scheduled_s = now_s
            if i < decode_from:
                self._prefilled(chunk)
            if chunk.sample:
                seq.num_sampled += 1
                seq.decoding = True
                if seq.exhausted:
                    seq.to_compress = 0  # its last token is on its way: nothing will read its cache again
                    self.queues.ends(seq)

    def _prefilled(self, chunk: Chunk) -> None:
        seq = chunk.seq
        self.admission.register(seq)
        if chunk.kept:
            self.stage.swap(seq, chunk.kept, chunk.fresh_pages, self.stats)
        elif chunk.defer:
            seq.to_compress = self.demand.kept(seq)
        elif self.compression and seq.num_computed == seq.request.compress_at and not seq.compressed:
            self.stats.left_whole += seq.leave_whole
            self.stats.too_short_to_compress += not seq.leave_whole

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

    def expire(self, now_s: float) -> list[Sequence]:
        """End every request whose time is over; their pages are free at once."""
        late = self.deadlines.due(now_s)
        for seq in late:
            self.cancel(seq, "timeout")
        self.stats.timeouts += len(late)
        return late

    def cancel(self, seq: Sequence, reason: str = "cancelled") -> None:
        """Forget a sequence; its pages are free at once. Tokens of it still in flight are dropped."""
        seq.finish_reason = reason
        if seq in self.running:
            self._release(seq)
        else:
            self.waiting.remove(seq)
