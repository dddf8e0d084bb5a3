"""What becomes of sequences: they wait, get a seat, advance when a step is launched, take the tokens that arrive a step
later, and give their pages back when they end or have to make room."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many

from fastcache.core import Chunk, Sequence, Step
from fastcache.engine.admission import Admission
from fastcache.engine.asides import Asides
from fastcache.engine.compress_stage import CompressStage
from fastcache.engine.deadlines import Deadlines
from fastcache.engine.demand import PageDemand
from fastcache.engine.queues import Queues
from fastcache.stats import EngineStats


class Progress:
    """The state that a scheduler plans against, and what changes it."""

    def __init__(
        self,
        stats: EngineStats,
        demand: PageDemand,
        admission: Admission,
        stage: CompressStage,
        queues: Queues,
        seats: int,
    ) -> None:
        self.stats, self.demand, self.admission = stats, demand, admission
        self.stage, self.asides, self.queues = stage, Asides(stage), queues
        self.deadlines = Deadlines()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission; prefilling ones included
        self._seats = list(range(seats - 1, -1, -1))
        self.in_flight = 0  # launched steps whose tokens have not been delivered

    @property
    def on_its_way(self) -> bool:
        """Whether something was launched whose end may free pages."""
        return bool(self.in_flight or self.stage.jobs or self.asides.steps)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running) or self.on_its_way

    def add(self, seq: Sequence) -> None:
        seq.ready_s = seq.request.arrival_s
        self.deadlines.add(seq)
        self.waiting.append(seq)

    def seat(self, seq: Sequence) -> None:
        """The first waiting sequence comes in."""
        seq.seat = self._seats.pop()
        self.running.append(self.waiting.popleft())
        self.queues.admitted(seq)
        self.stats.peak_running = max(self.stats.peak_running, len(self.running))

    def preempt(self, seq: Sequence) -> None:
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
        """The step is on its way to the device: advance counts, swap compressed page tables. Of a prefill that others
        run beside, `receive` does that."""
        self.stats.count(step)
        for chunk in step.chunks:
            if chunk.seq.scheduled_s is None:
                chunk.seq.scheduled_s = now_s
        if step.aside:
            self.asides.launched(step)
            return
        self.in_flight += 1
        self.asides.step_launched()
        self._advance(step.chunks, len(step.chunks) - step.decode_tokens, now_s)

    def receive(self, step: Step, tokens: list[int], eos: frozenset[int], now_s: float) -> list[Sequence]:
        """A prefill that others ran beside is complete: advance counts, deliver its tokens; returns who finished."""
        chunks = self.asides.received(step)
        self._advance(chunks, len(chunks), now_s)
        return self._deliver(step, tokens, eos, now_s)

    def _advance(self, chunks: Many[Chunk], decode_from: int, now_s: float) -> None:
        """`decode_from`: how many at the beginning are prompts'."""
        for i, chunk in enumerate(chunks):
            seq = chunk.seq
            seq.num_computed += chunk.length
            seq.kv_len += chunk.length
            seq.ready_s = now_s
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
        elif self.demand.compression and seq.num_computed == seq.request.compress_at and not seq.compressed:
            self.stats.left_whole += seq.leave_whole
            self.stats.too_short_to_compress += not seq.leave_whole

    def complete(self, step: Step, tokens: list[int], eos: frozenset[int], now_s: float) -> list[Sequence]:
        """Deliver the step's sampled tokens, in the order of its sampling chunks; returns who finished."""
        self.in_flight -= 1
        return self._deliver(step, tokens, eos, now_s)

    def _deliver(self, step: Step, tokens: list[int], eos: frozenset[int], now_s: float) -> list[Sequence]:
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
