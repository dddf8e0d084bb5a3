"""Token ids into text piece by piece: no half characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text that ids add to what came before. The pieces together are `tokenizer.decode` of all ids.

    A piece is the difference of two decodings that begin at the same earlier place, because a token's text may
    depend on its neighbour. Bytes of an unfinished character wait for the rest of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0  # of the context, and of what has not been given out

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        fresh = self._fresh()
        if fresh.endswith(REPLACEMENT) or not fresh:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return fresh

    def finish(self) -> str:
        """What was held back, complete or not."""
        fresh = self._fresh()
        self._start = self._read = len(self._ids)
        return fresh

    def _fresh(self) -> str:
        decode, start = self._tokenizer.decode, self._start
        return decode(self._ids[start:])[len(decode(self._ids[start : self._read])) :]


class StopScanner:
    """Lets text through up to the first stop string; a possible beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string. After `stopped` there is none."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            ready, self._held = self._held[: min(places)], ""
            return ready
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def finish(self) -> str:
        """What was held back in vain."""
        ready, self._held = ("" if self.stopped else self._held), ""
        return ready

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
