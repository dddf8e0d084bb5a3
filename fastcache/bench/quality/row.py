"""A quality row before anything was measured; every key of workflow/schemas/quality.schema.yaml. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastcache.bench.provenance import git_commit, source_digest
from fastcache.bench.quality.cells import QualityCell
from fastcache.device.info import versions

MEASURED = (
    "text_source",
    "attention_backend",
    "weights",
    "dtype",
    "stored_dtype",
    "device",
    "kept",
    "kv_bytes_per_token",
    "kv_bytes_share",
    "uncompressed_requests",
    "elapsed_s",
)


def blank_row(cell: QualityCell) -> dict[str, Any]:
    """What is known of a cell before it runs; the rest is None, and `tasks` is empty."""
    return {
        "cell_id": cell.id,
        "source_digest": source_digest(),
        "cell": cell.to_dict(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": None,
        "error": None,
        "model": cell.model,
        "method": cell.method,
        "label": cell.label,
        "guard": cell.guard,
        "compression_ratio": cell.compression_ratio,
        "kv_dtype": cell.kv_dtype,
        "head_budgets": cell.head_budgets,
        "query_aware": cell.query_aware,
        "seed": cell.seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "tasks": {},
        "notes": [],
        **dict.fromkeys(MEASURED),
    }
