"""A row before anything was measured, and the file it is written to. Imports no torch.

Every key of `workflow/schemas/row.schema.yaml` is here from the start, so that a cell that failed, hung or
was killed leaves the same columns as one that was measured: nulls, never zeros.
"""

from __future__ import annotations

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.provenance import git_commit, source_digest
from fastcache.compression.registry import TRANSFORMS
from fastcache.device.info import versions
from fastcache.errors import OutputPathError

STATUSES = ("ok", "oom", "unsupported", "timeout", "crashed", "failed")
PARTITION_FIELDS = (
    "greenctx_available",
    "greenctx_reason",
    "greenctx_provider",
    "greenctx_exclusive",
    "greenctx_granted_from",
    "greenctx_attempts",
    "requested_sms",
    "granted_sms",
)
MEASURED = (
    "text_source",
    "attention_backend",
    *PARTITION_FIELDS,
    "context_used",
    "output_used",
    "max_model_len",
    "prompt_tokens",
    "output_tokens",
    "total_tokens",
    "images",
    "image_tokens",
    "elapsed_s",
    "throughput_tok_s",
    "prefill_tok_s",
    "decode_tok_s",
    "ttft_s",
    "tpot_s",
    "repeats",
    "speedup_vs_baseline",
    "agreement",
    "kv_len_before",
    "kv_len_after",
    "pages_freed",
    "compressed_requests",
    "uncompressed_requests",
    "peak_kv_bytes",
    "peak_memory_bytes",
    "prefix_hit_tokens",
    "shareable_prefix_tokens",
    "preemptions",
    "peak_running",
    "decisions",
    "stage_s",
    "steps",
    "tpot_quantiles_s",
    "kv_timeline",
    "step_timeline",
    "clocks",
    "process_cells_before",
    "start_to_first_token_s",
    "ceiling_copy_bytes_s",
    "ceiling_gemm_flop_s",
    "prefill_mfu",
    "decode_mbu",
    "host_busy",
    "output_sample",
    "weights",
    "compressor",
    "dtype",
    "kv_dtype",
    "kv_bytes_per_token",
    "num_pages",
    "device",
)


def backend_of(cell: CellConfig) -> str | None:
    """The family of the cell's method, under the names that users know."""
    if not cell.compressed:
        return None
    return "mlp" if cell.method in TRANSFORMS else "evict"


def blank_row(cell: CellConfig) -> dict[str, Any]:
    """What is known of a cell before it runs; everything measured is None, and so is `status`."""
    workload = cell.workload
    return {
        "cell_id": cell.id,
        "baseline_id": cell.baseline_id,
        "source_digest": source_digest(),
        "cell": cell.to_dict(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": None,
        "error": None,
        "model": cell.model,
        "workload": workload.name,
        "batch_size": cell.batch_size,
        "num_batches": workload.num_batches,
        "variant": cell.variant,
        "method": cell.method,
        "head_budgets": cell.head_budgets,
        "backend": backend_of(cell),
        "compression_factor": cell.compression_factor,
        "policy": ("fixed" if cell.tuning == "off" else "auto") if cell.compressed else None,
        "stage_policy": cell.policy,
        "immediate_release": cell.immediate_release,
        "auto_tune": cell.tuning != "off",
        "auto_dual": cell.tuning == "all",
        "greenctx": cell.greenctx,
        "greenctx_compress_ratio": cell.greenctx_compress_ratio,
        "greenctx_main_ratio": cell.greenctx_main_ratio,
        "greenctx_main_stream": cell.greenctx_main_stream,
        "context_requested": workload.context,
        "output_requested": workload.output,
        "page_size": cell.page_size,
        "seed": cell.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "notes": [],
        **dict.fromkeys(MEASURED),
    }


def failure(status: str, kind: str, message: str) -> dict[str, Any]:
    """The fields of a row that ended with `status` instead of numbers."""
    assert status in STATUSES and status != "ok", status
    return {"status": status, "error": {"type": kind, "message": message or kind}}


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all: a reader never sees half a file. Errors: `OutputPathError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputPathError(
            f"cannot write {str(path)!r}: {error.strerror}. Choose another --output."
        ) from None
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Find out before hours of measuring whether `path` can be written. Errors: `OutputPathError`."""
    if path.is_dir():
        raise OutputPathError(f"cannot write {str(path)!r}: it is a folder. Name a file inside it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise OutputPathError(
            f"cannot write {str(path)!r}: {error.strerror}. Choose another --output."
        ) from None
