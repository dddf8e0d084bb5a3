"""What a stage policy sees: the scheduler's sequences as counts by stage."""

from __future__ import annotations

from collections.abc import Iterable

from fastcache.core import Sequence
from fastcache.engine.stages import Load, Queue


def load_of(
    now_s: float,
    running: Iterable[Sequence],
    waiting: Iterable[Sequence],
    enough: int,
    blocked: bool,
    at_once: int,
) -> Load:
    """Count every running sequence, and the tokens to prefill up to `enough`, which is one full step."""
    prefill, compress, decode, under_way, tokens = [], [], [], 0, 0
    for seq in running:
        if seq.to_compress:
            under_way += seq.under_way
            if not seq.under_way:
                compress.append(seq.ready_s)
        elif not seq.decoding:
            prefill.append(seq.ready_s)
            tokens += seq.num_tokens - seq.num_computed
        elif not seq.exhausted:
            decode.append(seq.ready_s)
    count = len(prefill)
    for seq in waiting:  # a queue may be long: its tokens matter only until a step is full
        count += 1
        if tokens < enough:
            prefill.append(seq.ready_s)
            tokens += seq.num_tokens
    return Load(
        now_s,
        Queue(count, min(prefill, default=now_s)),
        _queue(compress),
        _queue(decode),
        tokens,
        under_way,
        blocked,
        at_once,
    )


def _queue(since: list[float]) -> Queue:
    return Queue(len(since), min(since, default=0.0))
