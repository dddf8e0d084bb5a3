"""Whether a model and one request can be on a device at all, from shapes alone. Imports no torch.

What is counted is the least that any run needs, so a cell that is left out could not have run; one that is tried and
still runs out of memory becomes a row with status `oom`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from fastcache.bench import models
from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.work import ITEM_BYTES
from fastcache.errors import UserError
from fastcache.models.config import load_model_config

GIB = 2**30
# Tokens of the smallest step that the engine plans where nothing else is said.
SMALL_STEP = 2048


@cache
def shape_of(model: str, path: str | None) -> Any | None:
    """The `ModelConfig` of a cell's model; None for a folder that is not there yet or that the engine will refuse."""
    try:
        return load_model_config(models.engine_source(model, path), "dummy" if path is None else "auto")
    except UserError:
        return None


def kv_bytes_per_token(shape: Any, dtype: str, kv_dtype: str) -> int:
    item = 1 if kv_dtype == "fp8" else ITEM_BYTES[dtype]
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item


def dtype_of(cell: CellConfig, shape: Any) -> str:
    """What the engine computes in: as asked, else the checkpoint's own, which is float32 on a CPU."""
    if cell.dtype != "auto":
        return cell.dtype
    return "float32" if cell.device == "cpu" else shape.dtype


def least_bytes(cell: CellConfig, shape: Any) -> dict[str, int]:
    """Weights, the KV cache of one request, and the activations of a small step; bytes."""
    dtype = dtype_of(cell, shape)
    prompt = min(cell.workload.context, cell.model_len - cell.workload.output)
    stored = prompt if cell.compressed else prompt + cell.workload.output
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    width = 3 * shape.intermediate_size + 4 * shape.hidden_size + heads
    tokens = min(cell.max_num_batched_tokens or SMALL_STEP, SMALL_STEP, prompt)
    return {
        "weights": shape.num_parameters * ITEM_BYTES[dtype],
        "KV of one request": stored * kv_bytes_per_token(shape, dtype, cell.kv_dtype),
        "activations": tokens * width * ITEM_BYTES[dtype],
    }


def why_not(cell: CellConfig, memory_gib: float) -> str | None:
    """The arithmetic by which `cell` cannot be on a device with so much memory; None if it may."""
    shape = shape_of(cell.model, cell.model_path)
    if shape is None or cell.device == "cpu":
        return None
    parts = least_bytes(cell, shape)
    need, have = sum(parts.values()), memory_gib * GIB * cell.gpu_mem_util
    if need <= have:
        return None
    counted = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    usable = f"of {memory_gib:g} GiB the share {cell.gpu_mem_util:g} is {have / GIB:.1f}"
    return f"{counted} = {need / GIB:.1f} GiB, {usable}"
