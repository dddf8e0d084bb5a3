"""What a stage policy sees: the scheduler's sequences as counts by stage."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Many

from fastcache.core import Sequence
from fastcache.engine.stages import Load, Queue


class Queues:
    """Which running sequences do not decode, kept as they come and go: they are few, and nobody has to look through
    all the others for them at every step.

    `by_age`: whether anybody asks since when decoding sequences are ready, which does take a look at all.
    """

    def __init__(self, by_age: bool) -> None:
        self._by_age = by_age
        # In order of admission: those that did not decode when last seen, and those whose last token is on its way.
        self._early: dict[Sequence, None] = {}
        self._ending: dict[Sequence, None] = {}

    def admitted(self, seq: Sequence) -> None:
        self._early[seq] = None

    def ends(self, seq: Sequence) -> None:
        """Its last token is on its way: it stays until that has arrived, and decodes no more."""
        self._ending[seq] = None

    def left(self, seq: Sequence) -> None:
        self._early.pop(seq, None)
        self._ending.pop(seq, None)

    def early(self) -> list[Sequence]:
        """Sequences in prefill, or whose context is still to be compressed, in order of admission."""
        if any(seq.decoding and not seq.to_compress for seq in self._early):
            self._early = {seq: None for seq in self._early if seq.to_compress or not seq.decoding}
        return list(self._early)

    def decoding(self, running: list[Sequence]) -> list[Sequence]:
        """Those of `running` that can take another token, in order of admission."""
        if not self.early() and not self._ending:
            return running.copy()
        return [seq for seq in running if seq not in self._early and seq not in self._ending]

    def load(
        self,
        now_s: float,
        running: list[Sequence],
        waiting: Collection[Sequence],
        enough: int,
        blocked: bool,
        at_once: int,
    ) -> Load:
        """Count every running sequence, and the tokens to prefill up to `enough`, which is one full step."""
        early = self.early()
        idle = [seq for seq in early if not seq.under_way]
        prefill = [seq for seq in idle if not seq.to_compress]
        compress = [seq for seq in idle if seq.to_compress]
        tokens = sum(seq.num_tokens - seq.num_computed for seq in prefill)
        pending = len(prefill) + len(waiting)
        for seq in waiting:  # a queue may be long: it matters only until a step is full
            if tokens >= enough:
                break
            prefill.append(seq)
            tokens += seq.num_tokens
        decoding = len(running) - len(early) - len(self._ending)
        since_s = _since(self.decoding(running)) if self._by_age else now_s
        return Load(
            now_s,
            Queue(pending, _since(prefill, now_s)),
            Queue(len(compress), _since(compress)),
            Queue(decoding, since_s),
            min(tokens, enough),
            blocked,
            at_once,
        )


def _since(sequences: Many[Sequence], otherwise: float = 0.0) -> float:
    return min([seq.ready_s for seq in sequences], default=otherwise)
