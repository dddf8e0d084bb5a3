"""What runs beside the steps, compressions and prefills on a side of their own: launched when scheduled, taking effect
between two steps, timed without waiting."""

from __future__ import annotations

import time
from collections import deque

from fastcache.core import Step
from fastcache.device.timing import Span
from fastcache.engine.compress_stage import CompressionJob
from fastcache.engine.deferred import LaunchedJob
from fastcache.engine.pending import PendingTokens
from fastcache.engine.runner import Runner
from fastcache.engine.scheduler import Scheduler


class Jobs:
    """Between the scheduler, which plans jobs and swaps page tables, and the runner, which carries them out. `side`:
    the runner of prefills that decode steps run beside, in an engine that has some."""

    def __init__(self, scheduler: Scheduler, runner: Runner, side: Runner | None = None) -> None:
        self._scheduler, self._runner, self._side = scheduler, runner, side
        self._prefills: deque[PendingTokens] = deque()
        self._under_way: list[LaunchedJob] = []
        self._spans: list[
            tuple[Span, bool]
        ] = []  # of launched jobs, and whether it is part of the next step's time

    def launch(self, job: CompressionJob) -> None:
        self._scheduler.stage.launched(job, self._scheduler.stats)
        launched = self._runner.compress(job)
        # A job in the main stream delays the step behind it; on a CPU it is over before that step starts.
        self._spans.append((launched.span, launched.ready is None and self._runner.device.type == "cuda"))
        self._under_way.append(launched)
        if launched.ready is None:
            self.receive(wait=False)

    def receive(self, wait: bool) -> None:
        """Jobs that are done take effect. `wait`: for all that are under way."""
        tuner = self._scheduler.tuner
        for launched in list(self._under_way):
            if wait:
                started_s = time.perf_counter()
                launched.wait()
                if tuner is not None:
                    tuner.observed.waited(time.perf_counter() - started_s)
            if launched.done():
                self._under_way.remove(launched)
                now_s, stats = time.perf_counter(), self._scheduler.stats
                self._scheduler.stage.finished(launched.job, stats, now_s)
                stream = "main" if launched.ready is None else "compress"
                if seconds := launched.span.seconds():
                    stats.ran("compress", stream, seconds, now_s)
                if tuner is not None:
                    tuner.observed.job_done(launched.tokens)

    def prefill(self, step: Step, seeds: dict[str, int]) -> None:
        """Start a prefill on its side, behind all steps launched so far."""
        launched = self._side.launch(step, seeds, behind=self._runner)
        self._scheduler.commit(step, launched.launched_s)
        self._prefills.append(launched)

    def prefilled(self, least: int) -> list[PendingTokens]:
        """Those that are complete, in order of launch; `least`: so many of them are waited for."""
        complete: list[PendingTokens] = []
        while self._prefills and (len(complete) < least or self._prefills[0].done()):
            pending = self._prefills.popleft()
            # -1 of one that has ended: the seat that nobody has.
            seats = [chunk.seq.seat for chunk in pending.step.chunks if chunk.sample]
            self._runner.adopt(seats, pending.wait())
            complete.append(pending)
        return complete

    def account(self, pending: PendingTokens, elapsed_s: float, end_s: float) -> None:
        """Count the time of a step whose tokens have arrived, without that of jobs ahead of it in its stream."""
        if not pending.step.aside:
            elapsed_s -= self._seconds_before_step()
        stats, tuner = self._scheduler.stats, self._scheduler.tuner
        stats.add_time(pending.step, elapsed_s, end_s)
        inside = sum(span.seconds() or 0.0 for span in pending.spans)
        beside = pending.beside.seconds() if pending.beside is not None else None
        for stream, seconds in (("inside", inside), ("compress", beside)):
            if seconds:
                stats.ran("compress", stream, seconds, end_s)
        if tuner is not None:
            tuner.observe(pending.step, elapsed_s, inside, bool(self._under_way))

    def _seconds_before_step(self) -> float:
        inside, left = 0.0, []
        for span, in_step in self._spans:
            seconds = span.seconds()
            if seconds is None:
                left.append((span, in_step))
                continue
            self._scheduler.stats.compress_time_s += seconds
            inside += seconds if in_step else 0.0
        self._spans = left
        return inside
