"""What a stage policy sees: the scheduler's sequences as counts by stage."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fastcache.core import Sequence
from fastcache.engine.stages import Load, Queue


def load_of(
    now_s: float,
    running: Iterable[Sequence],
    waiting: Collection[Sequence],
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
        elif (
            seq.num_sampled < seq.request.sampling.max_tokens
        ):  # not `exhausted`: this runs for all, every step
            decode.append(seq.ready_s)
    count = len(prefill) + len(waiting)
    for seq in waiting:  # a queue may be long: it matters only until a step is full
        if tokens >= enough:
            break
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
