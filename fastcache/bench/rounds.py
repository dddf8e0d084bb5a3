"""How requests are put through an engine: the first token, warm-up rounds, timed rounds. Imports no torch."""

from __future__ import annotations

import os
import time
from typing import Any

from fastcache.bench.metrics import Round
from fastcache.bench.supervise import STARTED_VARIABLE
from fastcache.bench.workload import Batch
from fastcache.config import SamplingParams

# A warm-up round prefills a whole batch, which compiles and grows what has to be. Then a CPU needs a few tokens, and a
# GPU three: the graph of each batch size is captured at its first decode step. Where requests end at different times
# more sizes follow, and only a whole round meets them all.
CPU_WARMUP_TOKENS, GPU_WARMUP_TOKENS = 16, 3
# Rounds that a tuned engine may take at most to measure its costs, which part of a batch they run, and how many tokens.
MEASURING_ROUNDS, MEASURING_SHARE, MEASURING_TOKENS = 16, 4, 4


def start_to_first_token(llm: Any, cells_before: int = 0) -> float | None:
    """Seconds from this process's start to the first token of its first request; None if nobody noted the start, or if
    it has measured `cells_before` other cells, where that request is made all the same: each cell then goes alike."""
    started = os.environ.pop(STARTED_VARIABLE, None)
    if started is None and not cells_before:
        return None
    llm.generate([[1, 1, 1]], [SamplingParams(max_tokens=1, ignore_eos=True)])
    return None if started is None or cells_before else time.monotonic() - float(started)


def warmup_tokens(kind: str, batch: Batch) -> int | None:
    """At most this many tokens of each request in a warm-up round; None for all of them."""
    if kind == "cpu":
        return CPU_WARMUP_TOKENS
    alike = len({(len(request.prompt_token_ids), request.max_tokens) for request in batch}) == 1
    return GPU_WARMUP_TOKENS if alike else None


def warm_up(llm: Any, rounds: list[list[Batch]], kind: str, tuned: bool) -> None:
    """The first batch of each warm-up round. An engine that decides from measurement goes on, with a part of the
    last batch, until it has measured what it decides from."""
    tuned = tuned and bool(rounds)
    if tuned:
        llm.explore(freely=True)
    for batches in rounds:
        run_batch(llm, batches[0], warmup_tokens(kind, batches[0]))
    if not tuned:
        return
    few = rounds[-1][0][: max(1, len(rounds[-1][0]) // MEASURING_SHARE)]
    for _ in range(MEASURING_ROUNDS):
        if llm.decisions()["measured"]:
            break
        run_batch(llm, few, MEASURING_TOKENS)
    llm.explore(freely=False)


def run_round(llm: Any, batches: list[Batch]) -> Round:
    """Batches one after another, each of all its requests at once; wall time includes the gaps between them."""
    llm.reset_stats()
    outputs = []
    start = time.perf_counter()
    for batch in batches:
        outputs += run_batch(llm, batch)
    return Round(time.perf_counter() - start, outputs, llm.stats())


def run_batch(llm: Any, batch: Batch, at_most: int | None = None) -> list[Any]:
    """Greedy, and never stopped by an end-of-sequence token: every variant generates the same number."""
    limits = [min(request.max_tokens, at_most or request.max_tokens) for request in batch]
    params = [SamplingParams(max_tokens=limit, ignore_eos=True) for limit in limits]
    return llm.generate([request.prompt for request in batch], params)
