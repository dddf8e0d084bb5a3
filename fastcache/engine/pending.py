"""A step on its way: its tokens, and the events that say when they are there and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache.core import Step
from fastcache.device.timing import Span


@dataclass(eq=False)
class PendingTokens:
    """A launched step. `wait` blocks until its tokens are on the host. `ready` None: they already are.

    `arrived_s`: when `look` found them there (`time.perf_counter()` seconds).
    """

    step: Step
    tokens: Tensor  # (S,) int64 on the host, valid after `ready`
    ready: torch.cuda.Event | None
    launched_s: float
    spans: tuple[Span, ...] = ()  # of compression inside the step, where it is timed
    since: torch.cuda.Event | None = None  # where its time begins: see `Runner._since`
    beside: Span | None = None  # of compression on a stream of its own
    arrived_s: float | None = None

    def wait(self) -> list[int]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.tokens.tolist()

    def done(self) -> bool:
        return self.ready is None or self.ready.query()

    def look(self, new: dict[str, list[int]]) -> bool:
        """Whether the tokens are found to have arrived: true once. Then those of requests that have not ended are added
        to `new`, by request id."""
        if self.arrived_s is not None or not self.done():
            return False
        self.arrived_s = time.perf_counter()
        sampling = [chunk.seq for chunk in self.step.chunks if chunk.sample]
        for seq, token in zip(sampling, self.tokens.tolist(), strict=True):
            if seq.finish_reason is None:
                new.setdefault(seq.request.request_id, []).append(token)
        return True

    def seconds(self) -> float | None:
        """How long the device had the step, after `wait`; None where there are no events. The host's clock would count
        the time in which it launches the next step to the one that has long ended."""
        return None if self.since is None else self.since.elapsed_time(self.ready) / 1e3
