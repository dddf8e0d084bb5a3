"""When requests arrive and what they ask for: seeded, the same for every policy and method. Imports no torch.

Lengths and prompts depend on the seed and a request's number alone, so a higher rate sends the same requests in a
shorter time, and more of them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from fastcache.bench.cellconfig import WorkloadConfig
from fastcache.bench.datasets import TraceRow, read_trace
from fastcache.bench.pictures import text_tokens, with_pictures
from fastcache.bench.prompts import Order, PlannedRequest, Vocabulary, fill, random_ids
from fastcache.bench.serving.requests import LengthConfig, OpenLoopConfig
from fastcache.errors import DatasetError


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes: seconds from the start."""

    time_s: float
    request: PlannedRequest


def plan_arrivals(
    workload: OpenLoopConfig, rate: float, window_s: float, seed: int, vocabulary: Vocabulary
) -> list[Arrival]:
    """The requests of one window, in the order they arrive. Errors: `DatasetError`, `UnsupportedCombination`."""
    rows = _usable(workload) if workload.trace is not None else []
    prompts: list[list[int]] = []
    if workload.arrivals == "trace":
        times = trace_times(rows, rate, window_s, str(workload.trace))
    elif workload.arrivals == "fixed":
        times = [i / rate for i in range(max(1, round(rate * window_s)))]
    else:
        times = poisson_times(rate, window_s, random.Random(f"{seed}/arrivals"))
    if workload.dataset is not None:
        prompts = _prompts(workload, len(times), seed, vocabulary)
    return [
        Arrival(time, _request(workload, number, rows, prompts, seed, vocabulary))
        for number, time in enumerate(times)
    ]


def poisson_times(rate: float, window_s: float, rng: random.Random) -> list[float]:
    """Arrivals with exponential gaps of mean 1/rate within the window; the first request comes at 0."""
    times, now = [], 0.0
    while now < window_s:
        times.append(now)
        now += rng.expovariate(1.0) / rate
    return times


def trace_times(rows: Sequence[TraceRow], rate: float, window_s: float, name: str) -> list[float]:
    """The real arrival times of a trace's first rows, stretched so that `rate` requests come per second on average.

    A trace that is too short is replayed from its beginning, one mean gap behind its last request.
    """
    count = max(2, round(rate * window_s))
    stamps = [_seconds(row, name) for row in rows[:count]]
    gaps = [max(0.0, after - before) for before, after in itertools.pairwise(stamps)]
    if not gaps or sum(gaps) == 0:
        raise DatasetError(f"{name}: its usable rows have a single arrival time; give a trace with more.")
    gaps.append(sum(gaps) / len(gaps))
    stretch = len(gaps) / sum(gaps) / rate
    times, now = [], 0.0
    for number in range(count):
        times.append(now)
        now += gaps[number % len(gaps)] * stretch
    return times


def _seconds(row: TraceRow, name: str) -> float:
    try:
        return datetime.fromisoformat(row.timestamp or "").timestamp()
    except ValueError:
        raise DatasetError(
            f"{name}: TIMESTAMP is {row.timestamp!r}; arrivals 'trace' needs dates and times in every row, as in "
            "2023-11-16 18:17:03.9799600."
        ) from None


def _usable(workload: OpenLoopConfig) -> list[TraceRow]:
    """Rows whose output is within the bounds, and whose context is at least its lower one."""
    every = read_trace(str(workload.trace))
    context, output = workload.context, workload.output
    usable = [r for r in every if r.context >= context.low and output.low <= r.output <= output.high]
    if not usable:
        raise DatasetError(
            f"{workload.trace}: none of {len(every)} rows has at least {context.low} context tokens and "
            f"{output.low} to {output.high} generated tokens; change the bounds in serving.workload."
        )
    return usable


def _prompts(workload: OpenLoopConfig, count: int, seed: int, vocabulary: Vocabulary) -> list[list[int]]:
    """`count` prompts of a set, in seeded order, over and over if it has fewer that fit."""
    high = text_tokens(_pictures(workload, workload.context.high), workload.context.high, vocabulary)
    pictures = workload.context.high - high
    low = max(1, workload.context.low - pictures)
    given = WorkloadConfig("light-dataset", high, dataset_dir=workload.dataset, min_prompt_tokens=low)
    requests, _, _ = fill(Order(given, high, count, 1, seed, vocabulary))
    return [request.prompt_token_ids for request in requests]


def _pictures(workload: OpenLoopConfig, context: int) -> WorkloadConfig:
    return WorkloadConfig("synthetic-long", context=context, images=workload.images)


def _request(
    workload: OpenLoopConfig,
    number: int,
    rows: Sequence[TraceRow],
    prompts: Sequence[list[int]],
    seed: int,
    vocabulary: Vocabulary,
) -> PlannedRequest:
    rng = random.Random(f"{seed}/request/{number}")
    if rows:
        row = rows[number % len(rows)]
        context, output = min(row.context, workload.context.high), row.output
    else:
        context, output = draw_length(workload.context, rng), draw_length(workload.output, rng)
    pictures = _pictures(workload, context)
    texts = text_tokens(pictures, context, vocabulary)
    ids = prompts[number] if prompts else random_ids(rng, texts, vocabulary.size)
    return with_pictures(PlannedRequest(ids, output), pictures, number, seed, vocabulary)


def draw_length(length: LengthConfig, rng: random.Random) -> int:
    if length.median is None:
        return rng.randint(length.low, length.high)
    drawn = round(length.median * math.exp(rng.gauss(0.0, length.sigma)))
    return min(max(drawn, length.low), length.high)
