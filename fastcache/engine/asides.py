"""Prefills on one side of an SM split, beside decode steps on the other.

Such a step lasts as long as several decode steps, so it is received like a compression: its sequences are in no other
step until it is complete, and then, between two steps, it counts. Its pages are its own until then.
"""

from __future__ import annotations

from fastcache.core import Chunk, Step
from fastcache.engine.compress_stage import CompressStage
from fastcache.engine.stages import Turn

# One computes, and the next is launched already: its side never waits for the host.
MOST_UNDER_WAY = 2


class Asides:
    """The books of those under way, which share one split."""

    def __init__(self, stage: CompressStage) -> None:
        self._stage = stage
        self.steps: list[Step] = []  # in order of launch
        self._decode_next = False  # one was launched, and no step since

    @property
    def split(self) -> str | None:
        """The split in use: decode steps run on its other side."""
        return self.steps[0].split if self.steps else None

    def admit(self, turn: Turn) -> bool:
        """Whether a prefill may be planned: while some are under way, only another one like them, and not before the
        next step is launched, whose side would have nothing to do while the host launches two prefills."""
        if not self.steps:
            return True
        return turn.split == self.split and len(self.steps) < MOST_UNDER_WAY and not self._decode_next

    def launched(self, step: Step) -> None:
        self.steps.append(step)
        self._decode_next = True
        for chunk in step.chunks:
            chunk.seq.under_way = True

    def step_launched(self) -> None:
        self._decode_next = False

    def received(self, step: Step) -> tuple[Chunk, ...]:
        """`step` is complete. Returns the chunks of sequences that have not ended meanwhile; of the others, all pages
        are free."""
        self.steps.remove(step)
        return tuple(c for c in step.chunks if not self._stage.abandoned(c.seq, c.fresh_pages))
