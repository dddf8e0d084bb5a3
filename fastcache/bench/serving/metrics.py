"""From a recording to the numbers of a serving row. Pure functions; imports no torch.

TTFT counts every request: one that had no token when time was up counts with how long it had waited by then, which
is less than its TTFT would have been. TPOT, end-to-end and normalised latency are those of finished requests.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from fastcache.bench.metrics import percentile, tpot
from fastcache.bench.serving.cells import ServingCell
from fastcache.bench.serving.drive import Recording
from fastcache.results import RequestMetrics, RequestOutput
from fastcache.stats import KVSample

STAGES = ("prefill", "mixed", "decode", "compress")
FINISHED = ("stop", "length")
MAX_SAMPLES = 64


def summarise(cell: ServingCell, recording: Recording, page_bytes: int) -> dict[str, Any]:
    """The measured fields of a row (serving.schema.yaml)."""
    outputs, stats = recording.outputs, recording.stats
    elapsed = recording.end_s - recording.start_s
    done = [output.metrics for output in outputs if output.finish_reason in FINISHED]
    begun = [output.metrics for output in outputs if output.metrics.first_token_s is not None]
    ttft = [_ttft(output.metrics) for output in outputs]
    met = [m for m in done if _ttft(m) <= cell.slo_ttft_s and (_tpot(m) or 0.0) <= cell.slo_tpot_s]
    generated = sum(m.output_tokens for m in begun)
    spread = _distribution(ttft)
    samples = _thinned(stats.kv)
    mean_pages = _mean_pages(stats.kv, recording.end_s)
    return {
        "elapsed_s": elapsed,
        "requests": len(outputs),
        "finished": len(done),
        "without_first_token": len(outputs) - len(begun),
        "prompt_tokens": sum(m.prompt_tokens for m in begun),
        "output_tokens": generated,
        "throughput_tok_s": (sum(m.prompt_tokens for m in begun) + generated) / elapsed,
        "output_tok_s": generated / elapsed,
        "requests_s": len(done) / elapsed,
        "goodput_requests_s": len(met) / elapsed,
        "slo_attainment": len(met) / len(outputs),
        "ttft_s": spread,
        "tpot_s": _distribution([value for m in done if (value := _tpot(m)) is not None]),
        "token_gap_s": _distribution(_gaps(done)),
        "e2e_s": _distribution([m.finished_s - m.arrival_s for m in done]),
        "normalised_latency_s": _distribution([(m.finished_s - m.arrival_s) / m.output_tokens for m in done]),
        "queue_s": _distribution([_queue(m) for m in begun]),
        "sustained": spread["p99"] <= cell.sustained_ttft_s,
        "stage_share": _stages(stats, elapsed),
        "peak_pages": stats.peak_pages,
        "mean_pages": mean_pages,
        "peak_kv_bytes": stats.peak_pages * page_bytes,
        "mean_kv_bytes": mean_pages * page_bytes,
        "pages_over_time": [_sample(s, recording.start_s) for s in samples],
        "peak_running": stats.peak_running,
        "preemptions": stats.preemptions,
        "compressed_requests": stats.compressed_sequences,
        "too_short_to_compress": stats.too_short_to_compress,
    }


def request_records(recording: Recording) -> list[dict[str, Any]]:
    """Per request, seconds from the start: arrival, first step, every token, and how it ended."""
    start = recording.start_s
    ordered = sorted(recording.outputs, key=lambda output: output.metrics.arrival_s)
    return [_record(output, start) for output in ordered]


def _record(output: RequestOutput, start_s: float) -> dict[str, Any]:
    metrics = output.metrics
    scheduled = None if metrics.scheduled_s is None else round(metrics.scheduled_s - start_s, 6)
    return {
        "arrival_s": round(metrics.arrival_s - start_s, 6),
        "scheduled_s": scheduled,
        "token_times_s": [round(time - start_s, 6) for time in metrics.token_times_s],
        "finished_s": round(metrics.finished_s - start_s, 6),
        "finish_reason": output.finish_reason,
        "prompt_tokens": metrics.prompt_tokens,
        "output_tokens": metrics.output_tokens,
    }


def _ttft(metrics: RequestMetrics) -> float:
    end = metrics.finished_s if metrics.first_token_s is None else metrics.first_token_s
    return end - metrics.arrival_s


def _queue(metrics: RequestMetrics) -> float:
    """A step that has been launched may have had the request in it when its time of arrival was still a moment away."""
    return max(0.0, metrics.scheduled_s - metrics.arrival_s)


def _tpot(metrics: RequestMetrics) -> float | None:
    return tpot(metrics) if metrics.output_tokens > 1 else None


def _gaps(done: Sequence[RequestMetrics]) -> list[float]:
    """Between two tokens that arrived one after the other, of all requests."""
    pairs = itertools.chain.from_iterable(itertools.pairwise(m.token_times_s) for m in done)
    return [after - before for before, after in pairs]


def _distribution(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    named = {f"p{q}": percentile(values, q) for q in (50, 90, 99)}
    return named | {"mean": statistics.fmean(values)}


def _stages(stats: Any, elapsed_s: float) -> dict[str, float]:
    """Share of the wall time per kind of step; what is left of it is idle."""
    shares = {name: getattr(stats, f"{name}_time_s") / elapsed_s for name in STAGES}
    return shares | {"idle": max(0.0, 1 - sum(shares.values()))}


def _pages(sample: KVSample) -> int:
    return sample.before + sample.compressed + sample.whole + sample.held


def _mean_pages(samples: Sequence[KVSample], end_s: float) -> float:
    """Weighted by how long each sample stands."""
    if not samples:
        return 0.0
    times = [*(sample.time_s for sample in samples), max(end_s, samples[-1].time_s)]
    lasting = [after - before for before, after in itertools.pairwise(times)]
    if sum(lasting) <= 0:
        return float(_pages(samples[-1]))
    return sum(_pages(s) * t for s, t in zip(samples, lasting, strict=True)) / sum(lasting)


def _thinned(samples: Sequence[KVSample]) -> Sequence[KVSample]:
    return samples[:: -(-len(samples) // MAX_SAMPLES) or 1]


def _sample(sample: KVSample, start_s: float) -> dict[str, Any]:
    counts = ("before", "compressed", "whole", "held", "running", "waiting")
    return {"time_s": round(sample.time_s - start_s, 4)} | {name: getattr(sample, name) for name in counts}
