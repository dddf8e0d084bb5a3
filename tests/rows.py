"""Valid rows for tests that need some but measure nothing: one factory, numbers that differ by cell.

`rows_of(config)` gives one ok row per cell of a matrix config; `row(cell, **changes)` one row, and
`failed_row(cell, status)` one that was not measured.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

from fastcache.bench.matrix import CellConfig, expand

SMALL_MATRIX: dict[str, Any] = {
    "models": {"smollm2": {"path": "models/SmolLM2"}},
    "workloads": [
        {"name": "english-prose", "context": 512, "output": 64},
        {"name": "synthetic-long", "context": 512, "output": 64},
    ],
    "methods": ["snapkv", "streaming_llm"],
    "batch_sizes": [1, 4],
    "compression_factors": [5],
    "measure": {"repeats": 3},
}
GAIN = {
    "baseline": 1.0,
    "compression-only": 1.3,
    "greenctx-only": 1.2,
    "auto-tune+greenctx": 1.25,
    "triad": 1.35,
}


def row(cell: CellConfig, **changes: Any) -> dict[str, Any]:
    """One measured row of `cell`, as the cell itself writes it (the table's columns still null)."""
    full = _identity(cell) | _measured(cell)
    unknown = set(changes) - set(full)
    assert not unknown, f"no such field: {unknown}"
    return copy.deepcopy(full | changes)


def failed_row(
    cell: CellConfig, status: str = "oom", message: str = "the KV pool is too small"
) -> dict[str, Any]:
    """A row of a cell that ended with `status` instead of numbers."""
    nothing = dict.fromkeys(_measured(cell))
    return row(cell, **nothing, status=status, error={"type": "DeviceOutOfMemory", "message": message})


def rows_of(config: Mapping[str, Any] = SMALL_MATRIX) -> list[dict[str, Any]]:
    return [row(cell) for cell in expand(config).cells]


def _identity(cell: CellConfig) -> dict[str, Any]:
    asks = cell.greenctx
    return {
        "cell_id": cell.id,
        "baseline_id": cell.baseline_id,
        "source_digest": "0123456789abcdef",
        "cell": cell.to_dict(),
        "started_at": "2026-01-02T03:04:05+00:00",
        "status": "ok",
        "error": None,
        "model": cell.model,
        "workload": cell.workload.name,
        "batch_size": cell.batch_size,
        "num_batches": cell.workload.num_batches,
        "variant": cell.variant,
        "method": cell.method,
        "head_budgets": cell.head_budgets,
        "backend": "evict" if cell.compressed else None,
        "attention_backend": "torch_sdpa",
        "compression_factor": cell.compression_factor,
        "policy": "fixed" if cell.compressed else None,
        "stage_policy": cell.policy,
        "immediate_release": cell.immediate_release,
        "auto_tune": False,
        "auto_dual": False,
        "greenctx": asks,
        "greenctx_compress_ratio": cell.greenctx_compress_ratio,
        "greenctx_main_ratio": cell.greenctx_main_ratio,
        "greenctx_main_stream": cell.greenctx_main_stream,
        "greenctx_available": False if asks else None,
        "greenctx_reason": "the device is a CPU, which has no SMs to split" if asks else None,
        "greenctx_provider": None,
        "greenctx_exclusive": None,
        "greenctx_granted_from": None,
        "greenctx_attempts": None,
        "requested_sms": None,
        "granted_sms": None,
        "context_requested": cell.workload.context,
        "output_requested": cell.workload.output,
        "max_model_len": 4096,
        "peak_memory_bytes": 900_000_000,
        "compressor": None,
        "weights": {"kind": "checkpoint", "sha256": "ab" * 32},
        "dtype": "float32",
        "kv_dtype": "float32",
        "kv_bytes_per_token": 46_080,
        "page_size": cell.page_size,
        "num_pages": 4096,
        "seed": cell.seed,
        "device": {
            "kind": "cpu",
            "name": "Example CPU",
            "sm_count": None,
            "memory_bytes": 16_000_000_000,
            "compute_capability": None,
            "driver": None,
            "cuda": None,
            "cpu_model": "Example CPU",
            "cpu_cores": 2,
            "cpu_threads": 2,
            "host_memory_bytes": 16_000_000_000,
            "os": "Linux 6.1",
        },
        "versions": {"python": "3.12.3", "torch": "2.13.0", "fastcache": "0.1.0"},
        "git_commit": "1" * 40,
        "speedup_vs_baseline": None,
        "agreement": None,
        "notes": [],
    }


def _measured(cell: CellConfig) -> dict[str, Any]:
    """Numbers that are consistent with each other and differ from cell to cell, the same in every run."""
    noise = int(hashlib.sha256(cell.id.encode()).hexdigest()[:4], 16) / 65535
    requests = cell.batch_size * cell.workload.num_batches
    prompt, output = requests * cell.workload.context, requests * cell.workload.output
    speed = 300.0 * cell.batch_size**0.5 * GAIN[cell.variant] * (1 + 0.02 * noise)
    kept = cell.workload.context / (cell.compression_factor or 1)
    values = [speed * 0.99, speed, speed * 1.01][: cell.repeats]
    first = 0.2 * cell.batch_size * (1 + noise)
    return {
        "text_source": "seeded windows of a text",
        "context_used": cell.workload.context,
        "output_used": cell.workload.output,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "total_tokens": prompt + output,
        "images": requests * cell.workload.images,
        "image_tokens": requests * cell.workload.images * 576,
        "elapsed_s": (prompt + output) / speed,
        "throughput_tok_s": speed,
        "prefill_tok_s": speed * 2,
        "decode_tok_s": speed / 4,
        "ttft_s": {"p50": first, "p99": first * 1.5},
        "tpot_s": {"p50": 0.03 / GAIN[cell.variant], "p99": 0.04},
        "repeats": {"values": values, "median": speed, "spread": 0.02},
        "kv_len_before": float(cell.workload.context) if cell.compressed else None,
        "kv_len_after": kept if cell.compressed else None,
        "pages_freed": int(requests * (cell.workload.context - kept) // cell.page_size)
        if cell.compressed
        else 0,
        "compressed_requests": requests if cell.compressed else 0,
        "uncompressed_requests": 0 if cell.compressed else requests,
        "peak_kv_bytes": int(46_080 * cell.batch_size * (kept + cell.workload.output)),
        "prefix_hit_tokens": 0,
        "shareable_prefix_tokens": 0,
        "preemptions": 0,
        "peak_running": cell.batch_size,
        "host_busy": False,
        "decisions": None,
        "stage_s": {"prefill": 1.0, "mixed": 0.0, "compress": 0.0, "decode": 2.0},
        "steps": {"prefill": 2, "mixed": 0, "compress": 0, "decode": 63},
        "tpot_quantiles_s": [0.01 + 0.0001 * i for i in range(21)],
        "kv_timeline": None,
        "step_timeline": None,
        "clocks": None,
        "process_cells_before": 0,
        "start_to_first_token_s": 4.0 + noise,
        "ceiling_copy_bytes_s": 3e10,
        "ceiling_gemm_flop_s": 1e11,
        "prefill_mfu": 0.6 + 0.1 * noise,
        "decode_mbu": 0.5 + 0.1 * noise,
        "output_sample": [
            [
                (7 * i + j) % 97 if j < 20 or not cell.compressed else 98
                for j in range(min(64, cell.workload.output))
            ]
            for i in range(min(16, requests))
        ],
    }
