"""Pages in use over time, by the stage of the sequences that own them: a bounded number of samples."""

from __future__ import annotations

from collections.abc import Iterable

from fastcache.core import Sequence
from fastcache.stats import KVSample

MAX_SAMPLES = 256


class KVAccount:
    """Samples every step at first; each time the list is full, every second sample goes and the pace halves."""

    def __init__(self) -> None:
        self._interval_s = 0.0

    def sample(self, kept: list[KVSample], now_s: float, running: Iterable[Sequence], waiting: int) -> None:
        """Append the state at `now_s` to `kept`, unless the last sample is too young."""
        if not kept:
            self._interval_s = 0.0
        elif now_s - kept[-1].time_s < self._interval_s:
            return
        if len(kept) == MAX_SAMPLES:
            self._interval_s = 2 * (kept[-1].time_s - kept[0].time_s) / MAX_SAMPLES
            del kept[1::2]
        kept.append(_state(now_s, running, waiting))


def _state(now_s: float, running: Iterable[Sequence], waiting: int) -> KVSample:
    before = compressed = whole = held = count = 0
    for seq in running:
        count += 1
        held += len(seq.held)
        if seq.compressed:
            compressed += len(seq.pages)
        elif seq.decoding and not seq.to_compress:
            whole += len(seq.pages)
        else:
            before += len(seq.pages) + seq.fresh
    return KVSample(now_s, before, compressed, whole, held, count, waiting)
