"""How much a step computes and reads, counted: what its time is explained by."""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.core import Step


@dataclass(frozen=True)
class Amounts:
    """tokens through the model, (query, entry) pairs of prefill attention, KV bytes that decode rows read, context
    tokens compressed inside the step."""

    tokens: int
    pairs: float
    kv_bytes: float
    compressed: int


def amounts(step: Step, bytes_per_token: int) -> Amounts:
    first_row = len(step.chunks) - step.decode_tokens
    prompts, rows = step.chunks[:first_row], step.chunks[first_row:]
    return Amounts(
        tokens=0 if step.decode else sum(c.length for c in prompts) + len(rows),
        pairs=sum(c.length * (c.kv_start + c.length / 2) for c in prompts),
        kv_bytes=bytes_per_token * (sum([c.kv_start for c in rows]) + len(rows)),
        compressed=sum(c.kv_start + c.length for c in prompts if c.kept),
    )
