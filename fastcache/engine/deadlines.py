"""Requests that must end by a given time, whatever they have by then."""

from __future__ import annotations

import heapq
import itertools

from fastcache.core import Sequence


class Deadlines:
    """A heap of the sequences whose request has a `timeout_s`; looking costs nothing while none is due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._order = itertools.count()

    def add(self, seq: Sequence) -> None:
        if seq.request.timeout_s is not None:
            due_s = seq.request.arrival_s + seq.request.timeout_s
            heapq.heappush(self._heap, (due_s, next(self._order), seq))

    def due(self, now_s: float) -> list[Sequence]:
        """Unfinished sequences whose time is over; each is named once."""
        late = []
        while self._heap and self._heap[0][0] <= now_s:
            seq = heapq.heappop(self._heap)[2]
            if seq.finish_reason is None:
                late.append(seq)
        return late
