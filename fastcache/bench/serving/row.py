"""A serving row before anything was measured; every key of workflow/schemas/serving.schema.yaml. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastcache.bench.provenance import git_commit, source_digest
from fastcache.bench.serving.cells import ServingCell
from fastcache.device.info import versions

ENGINE_FACTS = ("attention_backend", "dtype", "num_pages", "max_model_len", "weights", "compressor", "device")
MEASURED = (
    "elapsed_s",
    "requests",
    "finished",
    "without_first_token",
    "prompt_tokens",
    "output_tokens",
    "throughput_tok_s",
    "output_tok_s",
    "requests_s",
    "goodput_requests_s",
    "slo_attainment",
    "ttft_s",
    "tpot_s",
    "token_gap_s",
    "e2e_s",
    "normalised_latency_s",
    "queue_s",
    "sustained",
    "stage_share",
    "peak_pages",
    "mean_pages",
    "peak_kv_bytes",
    "mean_kv_bytes",
    "pages_over_time",
    "peak_running",
    "preemptions",
    "compressed_requests",
    "too_short_to_compress",
    "host_busy",
    "decisions",
)


def blank_rows(cell: ServingCell) -> list[dict[str, Any]]:
    """One per rate, lowest first: what is known before they are measured; the rest is None."""
    return [_blank(cell, rate) for rate in cell.rates]


def _blank(cell: ServingCell, rate: float) -> dict[str, Any]:
    return {
        "row_id": cell.row_id(rate),
        "cell_id": cell.id,
        "source_digest": source_digest(),
        "cell": cell.to_dict() | {"rates": list(cell.rates)},
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": None,
        "error": None,
        "model": cell.model,
        "policy": cell.scheduled_by,
        "variant": cell.variant,
        "method": cell.method,
        "setting": cell.setting,
        "compression_factor": cell.compression_factor,
        "immediate_release": cell.immediate_release,
        "rate": rate,
        "arrivals": cell.workload.arrivals,
        "images": cell.workload.images,
        "window_s": cell.window_s,
        "seed": cell.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "notes": [],
        **dict.fromkeys((*ENGINE_FACTS, *MEASURED)),
    }
