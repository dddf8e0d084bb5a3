"""Which sequences the next step computes, and on which pages. Knows counts and page numbers, no tensors.

A stage policy (stages.py) says whose turn it is; this file says what that takes. Prompts are cut into chunks that
fit the token budget, decoding sequences get one token each, in steps of their own or behind a step's prefill
chunks. `schedule` plans a step against the current state, `commit` advances the state once the step has
been launched, `complete` delivers the sampled tokens, one step later. Work is planned by counts, so a step
can be planned before the previous one's tokens are known to the host. Those two are in progress.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from fastcache.core import Chunk, Sequence, Step
from fastcache.engine.admission import Admission
from fastcache.engine.chunks import Chunks, Limits
from fastcache.engine.compress_stage import CompressionJob, CompressStage
from fastcache.engine.demand import CompressionPlan, PageDemand
from fastcache.engine.kv_account import KVAccount
from fastcache.engine.policy import AFTER, INLINE
from fastcache.engine.progress import Progress
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


class Scheduler(Progress):
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
        self.limits, self.allocator, self._clock = limits, allocator, clock
        self.prefix, self.compression, self.tuner = prefix, compression, tuner
        self.policy = policy or PrefillFirst()
        # The prefix cache names whole pages and late release is about them, so then they must be there.
        replays = compression is not None and compression.replays
        direct = prefix is None and immediate_release and not replays
        defers = self.policy.deferred or (tuner is not None and tuner.may_defer)
        whole = direct and not (defers or self.policy.cuts_prompts)
        direct_tokens = limits.max_num_batched_tokens if whole else 0
        demand = PageDemand(limits.page_size, compression, immediate_release, direct_tokens)
        admission = Admission(allocator, demand, prefix)
        stage = CompressStage(allocator, demand, immediate_release)
        super().__init__(stats, demand, admission, stage, Queues(self.policy.by_age), limits.max_num_seqs)
        self.chunks = Chunks(limits, allocator, self.demand, direct)
        self._account = KVAccount()
        self._refused = False  # the first waiting request found too few pages

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
        if self.running and not self.on_its_way:
            # Only unfinished prefills and compressions are left, and each waits for pages another one holds.
            assert len(self.running) > 1, "a sequence that was admitted alone does not fit"
            self.preempt(self.running[-1])
            return self.schedule()
        return None

    def _take(self, turn: Turn) -> Step | CompressionJob | None:
        if turn.stage == PREFILL:
            return self._prefill(turn)
        if turn.stage == COMPRESS:
            return self.stage.plan(self.queues.early(), turn.max_seqs)
        chunks = self._decode(turn.max_seqs)
        return Step(tuple(chunks), decode=True, split=self.asides.split) if chunks else None

    def _prefill(self, turn: Turn) -> Step | None:
        if not self.asides.admit(turn):
            return None
        unfinished = (seq for seq in self.queues.early() if not (seq.to_compress or seq.under_way))
        tail = max(map(self.demand.tail, (*unfinished, *itertools.islice(self.waiting, 1))), default=1)
        limit, riders, chunks = self.limits.max_num_batched_tokens, [], []
        if turn.together:
            riders = self._decode(limit - tail)
        budget = min(limit - len(riders), max(turn.max_tokens or limit, tail))
        place = self._place(turn)
        defer = self.policy.deferred or (place is not None and place.startswith(AFTER))
        for seq in self.queues.early():  # anew: one may have made room for those who ride
            if len(chunks) == turn.max_seqs or budget <= 0:
                break
            if chunk := self.chunks.prefill(seq, budget, cut=turn.cut or not chunks, defer=defer):
                chunks.append(chunk)
                budget -= chunk.length
        while self.waiting and budget > 0 and self._seats and len(chunks) != turn.max_seqs:
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            chunk = self.chunks.prefill(seq, budget, cut=turn.cut or not chunks, defer=defer)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.length
        if not chunks:
            return Step(tuple(riders), decode=True) if riders else None
        # What reads stored entries comes first: then a backend has at most two runs of sequences to attend.
        chunks.sort(key=lambda chunk: chunk.kv_start == 0)
        step = Step((*chunks, *riders), False, len(riders), place, turn.split)
        if self.tuner is not None:
            self.tuner.taken(step)
        return step

    def _place(self, turn: Turn) -> str | None:
        """Where the contexts of a prefill are compressed, if that is chosen: on its own side of a split, inline."""
        if self.tuner is None or not self.compression:
            return None
        return self.tuner.place() if turn.split is None else INLINE

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
        self.seat(seq)
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
            if self.on_its_way:
                raise Drain
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        return True
