"""The scheduler and its policies on a device that is a formula: open-loop load without a model, in simulated seconds.

What a step costs is explicit, everything else is the engine's own: queues, admission, pages, policies, metrics. As in
`LLM.step`, a step is planned while the one before it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from fastcache.bench.serving.drive import Recording
from fastcache.bench.serving.workload import Arrival
from fastcache.config import SamplingParams
from fastcache.core import Request, Sequence, Step
from fastcache.engine.chunks import Limits
from fastcache.engine.compress_stage import CompressionJob
from fastcache.engine.outputs import request_output
from fastcache.engine.scheduler import Drain, Scheduler
from fastcache.engine.stages import StagePolicy
from fastcache.kvcache.pages import PageAllocator
from fastcache.stats import EngineStats

PAGE = 16


@dataclass(frozen=True)
class Device:
    """Seconds of work. A step reads the weights (`step_s`) or computes its prefill (`token_s` each), whichever takes
    longer; rows and stored entries that they attend come on top."""

    step_s: float
    token_s: float
    row_s: float
    entry_s: float
    compress_s: float  # per token of a context

    def step(self, step: Step) -> float:
        rows = step.chunks[len(step.chunks) - step.decode_tokens :]
        inline = sum(chunk.kv_start + chunk.length for chunk in step.chunks if chunk.kept)
        work = max(self.step_s, step.prefill_tokens * self.token_s) + len(rows) * self.row_s
        return work + sum(c.kv_start for c in rows) * self.entry_s + inline * self.compress_s

    def job(self, job: CompressionJob) -> float:
        return self.step_s / 4 + job.num_tokens * self.compress_s


class Fifth:
    """The numbers of a method that keeps a fifth and looks at the last 64 queries (`demand.CompressionPlan`)."""

    replays = False

    def tail(self, num_tokens: int) -> int:
        return min(64, num_tokens)

    def kept(self, num_tokens: int, image_spans: tuple[tuple[int, int], ...] = ()) -> int:
        return num_tokens // 5 if num_tokens // 5 > 64 else 0

    def layout(self, num_tokens: int) -> None:
        return None


class Simulation:
    """One engine under one policy, at time 0."""

    def __init__(
        self,
        device: Device,
        policy: StagePolicy,
        compressed: bool = True,
        pages: int = 20_000,
        tokens: int = 32_768,
        max_num_seqs: int = 256,
        release: bool = True,
    ) -> None:
        self.device, self.now_s, self._free_s = device, 0.0, 0.0
        self.scheduler = Scheduler(
            Limits(tokens, max_num_seqs, PAGE),
            PageAllocator(pages),
            EngineStats(),
            compression=Fifth() if compressed else None,
            policy=policy,
            immediate_release=release,
            clock=lambda: self.now_s,
        )
        self._pending: tuple[Step, float] | None = None
        self._done: list[Sequence] = []

    def run(self, arrivals: Many[Arrival], deadline_s: float) -> Recording:
        """As `drive`: what is not done `deadline_s` after the start is cancelled."""
        coming, seqs = deque(arrivals), []
        while (coming or self.scheduler.has_unfinished) and self.now_s <= deadline_s:
            while coming and coming[0].time_s <= self.now_s:
                seqs.append(self._add(coming.popleft(), len(seqs)))
            if self.scheduler.has_unfinished:
                self._step()
            elif coming:
                self.now_s = coming[0].time_s
        seqs += [self._add(arrival, len(seqs) + i) for i, arrival in enumerate(coming)]
        for seq in seqs:
            if seq.finish_reason is None:
                self.scheduler.cancel(seq)
                self._done.append(seq)
        outputs = [request_output(seq, "", self.now_s) for seq in self._done]
        stats = self.scheduler.stats
        stats.peak_pages = self.scheduler.allocator.peak_used
        return Recording(0.0, self.now_s, outputs, stats)

    def _add(self, arrival: Arrival, number: int) -> Sequence:
        params = SamplingParams(max_tokens=arrival.request.max_tokens, ignore_eos=True)
        ids = tuple(arrival.request.prompt_token_ids)
        seq = Sequence(Request(str(number), ids, params, arrival.time_s))
        self.scheduler.add(seq)
        return seq

    def _step(self) -> None:
        try:
            step = self._next()
        except Drain:
            self._deliver()
            step = self._next()
        if step is None:
            assert self._pending is not None, "requests are there, nothing runs and nothing was planned"
            self._deliver()
            return
        cost = self.device.step(step)
        start = max(self.now_s, self._free_s)
        self._free_s = start + cost
        self.scheduler.stats.add_time(step, cost, self._free_s)
        self.scheduler.commit(step, self.now_s)
        self._deliver()
        self._pending = (step, self._free_s)

    def _next(self) -> Step | None:
        while isinstance(work := self.scheduler.schedule(), CompressionJob):
            self.scheduler.stage.launched(work, self.scheduler.stats)
            cost = self.device.job(work)
            self._free_s = max(self.now_s, self._free_s) + cost
            self.scheduler.stats.compress_time_s += cost
            self.scheduler.stage.finished(work, self.scheduler.stats, self.now_s)
        return work

    def _deliver(self) -> None:
        if self._pending is None:
            return
        (step, end_s), self._pending = self._pending, None
        self.now_s = max(self.now_s, end_s)
        samples = sum(chunk.sample for chunk in step.chunks)
        self._done += self.scheduler.complete(step, [1] * samples, frozenset(), self.now_s)
