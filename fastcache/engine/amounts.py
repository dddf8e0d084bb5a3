"""How much a step computes and reads, counted: what its time is explained by."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from fastcache.core import Chunk, Step

_START = attrgetter("kv_start")


@dataclass(frozen=True)
class Amounts:
    """tokens through the model, (query, entry) pairs of prefill attention, KV bytes that decode rows read, context
    tokens compressed inside the step."""

    tokens: int
    pairs: float
    kv_bytes: float
    compressed: int


def amounts(step: Step, bytes_per_token: int) -> Amounts:
    if step.decode:
        return Amounts(0, 0.0, bytes_per_token * (_stored(step.chunks) + len(step.chunks)), 0)
    first_row = len(step.chunks) - step.decode_rows
    prompts, rows = step.chunks[:first_row], step.chunks[first_row:]
    return Amounts(
        tokens=sum(c.length for c in prompts) + len(rows),
        pairs=sum(c.length * (c.kv_start + c.length / 2) for c in prompts),
        kv_bytes=bytes_per_token * (_stored(rows) + len(rows)),
        compressed=sum(c.kv_start + c.length for c in prompts if c.kept),
    )


def _stored(rows: tuple[Chunk, ...]) -> int:
    """Entries before each row's own, in all."""
    return sum(map(_START, rows))
