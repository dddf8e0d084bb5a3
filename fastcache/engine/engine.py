"""`LLM`: the engine as its users see it. Text or token ids in, finished requests out.

The way of a request: add_request -> Scheduler.schedule -> Runner.launch -> Scheduler.commit -> (a step later)
Scheduler.complete -> RequestOutput.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from fastcache.config import EngineConfig, SamplingParams, require
from fastcache.core import Request, Sequence, Step
from fastcache.device.green_context import partition
from fastcache.engine.asides import MOST_UNDER_WAY
from fastcache.engine.build import Parts, build
from fastcache.engine.calibration import head_shares
from fastcache.engine.checks import check_request
from fastcache.engine.compress_stage import CompressionJob
from fastcache.engine.jobs import Jobs
from fastcache.engine.offline import Offline
from fastcache.engine.outputs import request_output
from fastcache.engine.pending import PendingTokens
from fastcache.engine.prompts import Prompt, PromptReader
from fastcache.engine.replay import replay_prompt
from fastcache.engine.scheduler import Drain
from fastcache.errors import ConfigError, UnsupportedCombination
from fastcache.results import RequestOutput
from fastcache.stats import EngineLoad, EngineStats

# Step, its tokens, tokens that end a request, the time: who finished.
Complete = Callable[[Step, list[int], frozenset[int], float], list[Sequence]]


class LLM(Offline):
    """A model, its KV pool and a scheduler, on one device.

    `LLM(model, **options)`: `model` is a local Hugging Face folder (or a preset's name with
    `load_format="dummy"`), options are the fields of `EngineConfig`; an unknown option is an error.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig.from_dict({"model": str(model), **options})
        self._parts: Parts = build(self.config)
        self.model_config, self.tokenizer = self._parts.model_config, self._parts.tokenizer
        self._reader = PromptReader(self.model_config, self.tokenizer, self._parts.processor)
        self._scheduler, self._runner = self._parts.scheduler, self._parts.runner
        self._stats = self._scheduler.stats
        self._jobs = Jobs(self._scheduler, self._runner, self._parts.side)
        self._pending: PendingTokens | None = None
        for runner in filter(None, (self._runner, self._parts.side)):
            runner.on_layer = self._look
        self._last_result_s = 0.0
        self._ids = itertools.count()
        self._live: dict[str, Sequence] = {}
        self._seeds: dict[str, int] = {}
        self.new_tokens: dict[str, list[int]] = {}
        self.on_tokens: Callable[[], object] = lambda: None

    # -- requests ----------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        arrival_s: float | None = None,
        context_len: int | None = None,
        timeout_s: float | None = None,
        logprobs_from: int | None = None,
    ) -> str:
        """Queue one prompt; returns its id. Errors: `PromptTooLong`, `OutOfPages`, `ConfigError`, `ImageError`,
        `QueueFull`.

        With pictures a prompt is {"prompt": text or ids, "images": [path, bytes or PIL image, ...]} and has an
        `<image>` for each. `context_len`: how many leading tokens compression may shrink (default: the whole
        prompt; 0: none), an `<image>` being one. `timeout_s`: seconds from its arrival after which it ends with
        what it has (default: never). `logprobs_from`: the output has `logprobs` from this position of the
        (expanded) prompt on.
        """
        arrival = time.perf_counter() if arrival_s is None else arrival_s
        read = self._reader.read(prompt, context_len)
        params = sampling_params or SamplingParams()
        number = next(self._ids)
        request_id = str(number) if request_id is None else request_id
        if request_id in self._live:
            raise ConfigError(f"request id {request_id!r} is in use; give each request its own.")
        request = Request(
            request_id, read.tokens, params, arrival, read.context_len, read.images, timeout_s, logprobs_from
        )
        seq = Sequence(request)
        check_request(seq, self._scheduler, self._parts.max_model_len, self.config)
        self._live[request_id] = seq
        self._seeds[request_id] = (
            self.config.seed * 1_000_003 + number if params.seed is None else params.seed
        )
        self._scheduler.add(seq)
        return request_id

    def cancel(self, request_id: str) -> RequestOutput | None:
        """End a request; its pages are free at once. Returns what it has, None for unknown or finished ids."""
        seq = self._live.get(request_id)
        if seq is None:
            return None
        self._scheduler.cancel(seq)
        return self._output(seq, time.perf_counter())

    # -- steps -------------------------------------------------------------------------------------------------

    def has_unfinished(self) -> bool:
        return self._scheduler.has_unfinished

    def step(self) -> list[RequestOutput]:
        """Launch the next step and deliver the one before it; returns the requests that ended.

        Afterwards `new_tokens` has the tokens it delivered, by request id, of running and ended requests. `on_tokens`
        is called if some are there while the launch still goes on: it may take them, and use nothing else of this.
        """
        now = time.perf_counter()
        self.new_tokens = {}
        finished = [self._output(seq, now) for seq in self._scheduler.expire(now)]
        finished += self._receive()
        while True:
            try:
                step = self._next()
                break
            except Drain:  # more than once where a prefill that needs no page is launched on the way
                finished += self._deliver() + self._receive(MOST_UNDER_WAY)
        if step is None:
            if self._pending is None:
                finished += self._receive(1)
            return finished + self._deliver()
        launched = self._runner.launch(step, self._seeds)
        self._scheduler.commit(step, launched.launched_s)
        # Deliver the previous step while the device runs this one.
        finished += self._deliver()
        self._pending = launched
        if launched.ready is None:  # computed already: a device without streams has nothing to overlap
            finished += self._deliver()
        return finished

    def _next(self) -> Step | None:
        """The next step; what comes before it and runs beside it is launched on the way."""
        while (work := self._scheduler.schedule()) is not None:
            if isinstance(work, CompressionJob):
                self._jobs.launch(work)
            elif work.aside:
                self._jobs.prefill(work, self._seeds)
            else:
                break
        return work

    def _receive(self, least: int = 0) -> list[RequestOutput]:
        """What ran beside the steps and is complete takes effect. `least`: so many prefills, and all compressions, are
        waited for."""
        self._jobs.receive(wait=least > 0)
        prefills = self._jobs.prefilled(least)
        return [output for each in prefills for output in self._take(each, self._scheduler.receive)]

    def _look(self) -> None:
        """In each layer of a launch: note when the tokens of the step before arrive. The launch waits for the device
        wherever more kernels are queued than CUDA lets be, so behind it they would be noticed late. What they change
        in the books has to wait all the same: the step being launched was planned without it."""
        if self._pending is not None and self._pending.look(self.new_tokens):
            self.on_tokens()

    def _deliver(self) -> list[RequestOutput]:
        if self._pending is None:
            return []
        pending, self._pending = self._pending, None
        return self._take(pending, self._scheduler.complete)

    def _take(self, pending: PendingTokens, complete: Complete) -> list[RequestOutput]:
        """A step's tokens, waited for; returns the requests that they ended."""
        tokens = pending.wait()
        pending.look(self.new_tokens)
        now = pending.arrived_s
        self._account(pending, now)
        done = complete(pending.step, tokens, self._parts.eos, now)
        return [self._output(seq, now) for seq in done]

    def _account(self, pending: PendingTokens, now: float) -> None:
        """A step's time runs from its launch, or from the end of the step before it if that came later. Decode steps
        beside a prefill are timed by what requests see, as the host launches both."""
        elapsed, step = pending.seconds(), pending.step
        if elapsed is None or (step.split is not None and step.decode):
            elapsed = now - max(self._last_result_s, pending.launched_s)
        if not step.aside:
            self._last_result_s = now
        self._jobs.account(pending, elapsed, now)

    def _output(self, seq: Sequence, now: float) -> RequestOutput:
        del self._live[seq.request.request_id], self._seeds[seq.request.request_id]
        for each in (self._runner, self._parts.side):
            if each is not None:
                each.forget(seq)
        text = self.tokenizer.decode(seq.output_ids) if self.tokenizer is not None else ""
        return request_output(seq, text, now)

    # -- partitions --------------------------------------------------------------------------------------------

    def use_split(self, compress_ratio: float, main_ratio: float) -> None:
        """Change the SM split between two steps; running requests go on. Each split is made once and kept.

        Errors: `UnsupportedCombination` if the engine was built without a partition, or the split is required
        and cannot be had; `ConfigError` for ratios out of range.
        """
        old = self._parts.config.partition
        require(
            self.config.tuning == "off", "the engine chooses its splits itself: use_split needs tuning 'off'."
        )
        if not old.enabled or self._runner.device.type != "cuda":
            raise UnsupportedCombination(
                "use_split needs an engine with a partition on a CUDA device; build LLM(..., partition="
                "{'enabled': True, ...})."
            )
        config = dataclasses.replace(old, compress_ratio=compress_ratio, main_ratio=main_ratio)
        split = self._parts.partition = partition(config, self._runner.device)
        self._runner.use_streams(split.main, split.compress)

    # -- reports -----------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        allocator = self._scheduler.allocator
        self._stats.peak_pages = allocator.peak_used
        self._stats.peak_kv_bytes = allocator.peak_used * self._runner.pool.page_bytes
        return self._stats

    def load(self) -> EngineLoad:
        """Requests and pages at this moment."""
        scheduler = self._scheduler
        used, have = scheduler.allocator.used, scheduler.allocator.num_pages - 1
        return EngineLoad(len(scheduler.running), len(scheduler.waiting), used, have)

    def reset_stats(self) -> None:
        self._stats = self._scheduler.stats = EngineStats()
        if self._scheduler.tuner is not None:
            self._scheduler.tuner.reset()
        self._scheduler.allocator.peak_used = self._scheduler.allocator.used

    def head_shares(self, contexts: Many[Many[int]], ratios: Many[float]) -> np.ndarray:
        """(ratios, layers, kv_heads): what each KV head keeps of plain texts (see `engine.calibration`)."""
        prompt = replay_prompt(self.tokenizer)
        return head_shares(self._runner.model, prompt, contexts, ratios, self._parts.max_model_len)

    def decisions(self) -> dict[str, Any] | None:
        """What was decided since the last `reset_stats`, on which costs; None where nothing is (`tuning` off)."""
        return None if self._scheduler.tuner is None else self._scheduler.tuner.report()

    def explore(self, freely: bool) -> None:
        """Whether alternatives may be tried at any cost, as in a warm-up, or at a small share of it (the default)."""
        if self._scheduler.tuner is not None:
            self._scheduler.tuner.freely = freely

    def describe(self) -> dict[str, Any]:
        """What runs on what: the facts a row records about the engine."""
        return self._parts.describe()

    def check_books(self) -> None:
        """Assert that no page is lost or owned twice, and that an idle engine owns none."""
        allocator = self._scheduler.allocator
        allocator.check()
        if not self.has_unfinished():
            assert allocator.used == 0, f"{allocator.used} pages are owned by nobody's request"

    def close(self) -> None:
        """Give the device's memory back. The object cannot be used afterwards."""
        self._parts.close()
        del self._parts, self._runner, self._scheduler, self._jobs
