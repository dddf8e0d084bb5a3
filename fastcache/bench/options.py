"""The engine settings that every kind of cell has under the same name. Imports no torch."""

from __future__ import annotations

from typing import Any

from fastcache.bench import models

SAME_NAME = (
    "load_format",
    "dtype",
    "kv_dtype",
    "device",
    "page_size",
    "max_num_batched_tokens",
    "num_pages",
    "enable_prefix_caching",
    "attention_backend",
    "enforce_eager",
    "seed",
    "policy",
    "immediate_release",
)


def common_options(cell: Any) -> dict[str, Any]:
    """Keyword arguments of `LLM` for a `CellConfig` or a `ServingCell`, all but sequences and compression."""
    return {
        "model": models.engine_source(cell.model, cell.model_path),
        "max_model_len": cell.model_len,
        "gpu_memory_utilization": cell.gpu_mem_util,
        **{name: getattr(cell, name) for name in SAME_NAME},
    }
