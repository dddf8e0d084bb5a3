"""From what the engine reports to the numbers of a row. Pure functions; imports no torch.

Counts and rates are those of one timed round, the one with the (lower) median throughput, so that a row's
arithmetic closes: total_tokens / elapsed_s is throughput_tok_s. Percentiles pool the requests of all rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastcache.results import RequestMetrics, RequestOutput
from fastcache.stats import EngineStats, KVSample, Segment

SAMPLE_REQUESTS, SAMPLE_TOKENS = 16, 64
TIMELINE = 64


@dataclass(frozen=True)
class Round:
    """One timed round: wall seconds from the first request added to the last one finished."""

    elapsed_s: float
    outputs: list[RequestOutput]
    stats: EngineStats

    @property
    def prompt_tokens(self) -> int:
        return sum(output.metrics.prompt_tokens for output in self.outputs)

    @property
    def output_tokens(self) -> int:
        return sum(output.metrics.output_tokens for output in self.outputs)

    @property
    def throughput(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.elapsed_s


def middle_round(rounds: Sequence[Round]) -> Round:
    """The round with the (lower) median throughput; all counts and rates of a row are its."""
    values = [r.throughput for r in rounds]
    return rounds[values.index(statistics.median_low(values))]


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """The measured fields of a row (see row.schema.yaml) from at least one timed round."""
    assert rounds, "a measurement has at least one round"
    values = [r.throughput for r in rounds]
    middle = middle_round(rounds)
    pooled = [output.metrics for r in rounds for output in r.outputs]
    tpots = [tpot(m) for m in pooled if m.output_tokens > 1]
    return {
        "prompt_tokens": middle.prompt_tokens,
        "output_tokens": middle.output_tokens,
        "total_tokens": middle.prompt_tokens + middle.output_tokens,
        "elapsed_s": middle.elapsed_s,
        "throughput_tok_s": middle.throughput,
        **stages(middle.stats),
        "ttft_s": percentiles([m.first_token_s - m.arrival_s for m in pooled]),
        "tpot_s": percentiles(tpots),
        "tpot_quantiles_s": [percentile(tpots, 5 * i) for i in range(21)] if tpots else None,
        "repeats": spread(values),
        "images": sum(output.metrics.images for output in middle.outputs),
        "image_tokens": sum(output.metrics.image_tokens for output in middle.outputs),
        "preemptions": middle.stats.preemptions,
        "prefix_hit_tokens": middle.stats.prefix_hit_tokens,
        "peak_kv_bytes": max(r.stats.peak_kv_bytes for r in rounds),
        "peak_running": max(r.stats.peak_running for r in rounds),
        "output_sample": output_sample(rounds[0].outputs),
        **compression([output.metrics for output in middle.outputs]),
    }


def stages(stats: EngineStats) -> dict[str, Any]:
    """Rates of pure prefill and decode steps, the time and number of each kind of step, and pages over time."""
    kinds = ("prefill", "mixed", "compress", "decode")
    return {
        "prefill_tok_s": _rate(stats.prefill_tokens - stats.mixed_prefill_tokens, stats.prefill_time_s),
        "decode_tok_s": _rate(stats.decode_tokens - stats.mixed_decode_tokens, stats.decode_time_s),
        "stage_s": {kind: getattr(stats, f"{kind}_time_s") for kind in kinds},
        "steps": {kind: getattr(stats, f"{kind}_steps") for kind in kinds},
        "kv_timeline": timeline(stats.kv),
        "step_timeline": step_timeline(stats.segments, stats.kv),
    }


def timeline(samples: Sequence[KVSample]) -> dict[str, list[float]] | None:
    """One list per field of `KVSample`, of at most TIMELINE samples; seconds from the first one."""
    kept = samples[:: -(-len(samples) // TIMELINE)] if samples else []
    if not kept:
        return None
    columns = {f.name: [getattr(s, f.name) for s in kept] for f in dataclasses.fields(KVSample)}
    return columns | {"time_s": [round(s.time_s - kept[0].time_s, 4) for s in kept]}


def step_timeline(segments: Sequence[Segment], samples: Sequence[KVSample]) -> dict[str, list[Any]] | None:
    """One list per field of `Segment`; seconds from the first of `samples`, as in `timeline`."""
    if not segments or not samples:
        return None
    columns = {f.name: [getattr(s, f.name) for s in segments] for f in dataclasses.fields(Segment)}
    begin = samples[0].time_s
    times = {n: [round(max(s - begin, 0.0), 4) for s in columns[n]] for n in ("start_s", "end_s")}
    return columns | times


def compression(metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """What compression did to a round's requests; lengths are means over the compressed ones, or None."""
    done = [m for m in metrics if m.compressed]
    return {
        "kv_len_before": statistics.fmean(m.kv_len_before for m in done) if done else None,
        "kv_len_after": statistics.fmean(m.kv_len_after for m in done) if done else None,
        "pages_freed": sum(m.pages_freed for m in done),
        "compressed_requests": len(done),
        "uncompressed_requests": len(metrics) - len(done),
    }


def tpot(metrics: RequestMetrics) -> float:
    """Seconds per output token after the first one."""
    return (metrics.finished_s - metrics.first_token_s) / (metrics.output_tokens - 1)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    return {"p50": percentile(values, 50), "p99": percentile(values, 99)} if values else None


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, linear between the two nearest ranks."""
    ranked = sorted(values)
    place = (len(ranked) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Values, their lower median, and (largest - smallest) / median."""
    middle = statistics.median_low(values)
    return {"values": list(values), "median": middle, "spread": (max(values) - min(values)) / middle}


def output_sample(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(output.token_ids[:SAMPLE_TOKENS]) for output in outputs[:SAMPLE_REQUESTS]]


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
