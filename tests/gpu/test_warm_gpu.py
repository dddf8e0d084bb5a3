"""Cells on a GPU that share a process: the rows of fresh ones, and the memory given back."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid

import pytest
import torch

from fastcache.bench import supervise, warm
from fastcache.bench.matrix import CellConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SAME = (
    *(
        "status",
        "num_pages",
        "kv_bytes_per_token",
        "weights",
        "prompt_tokens",
        "output_tokens",
        "preemptions",
    ),
    *("peak_running", "granted_sms", "greenctx_provider", "attention_backend"),
)
BY_A_DECISION = ("kv_len_after", "compressed_requests", "pages_freed", "peak_kv_bytes")


def cell(variant: str, **changes) -> CellConfig:
    values = {
        "model": "smollm2",
        "load_format": "dummy",
        "workload": {"name": "synthetic-long", "context": 512, "output": 16},
        "batch_size": 8,
        "variant": variant,
        "device": "cuda",
        "dtype": "bfloat16",
        "gpu_mem_util": 0.5,
        "repeats": 1,
        "timeout_s": 300,
    }
    if variant != "baseline":
        values |= {"method": "snapkv", "compression_factor": 4}
    if variant not in ("baseline", "compression-only"):
        values |= {"greenctx_compress_ratio": 0.25, "greenctx_main_ratio": 0.75}
    return CellConfig.from_dict(values | changes)


def test_rows_of_a_shared_process_are_those_of_fresh_ones(monkeypatch):
    cells = [cell("baseline"), cell("triad"), cell("compression-only"), cell("baseline")]
    fresh = [supervise.run_cell(each) for each in cells]
    monkeypatch.setenv(warm.KEEP_VARIABLE, "60")
    monkeypatch.setenv("FASTCACHE_TEST", uuid.uuid4().hex)
    try:
        kept = [warm.run_cell(each) for each in cells]
    finally:
        for pid in warm._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    assert [row["process_cells_before"] for row in kept] == [0, 1, 2, 3], [row["error"] for row in kept]
    for row, alone in zip(kept, fresh, strict=True):
        names = SAME if row["variant"] == "triad" else SAME + BY_A_DECISION
        assert {name: row[name] for name in names} == {name: alone[name] for name in names}
        if row["variant"] != "triad":
            assert row["peak_memory_bytes"] == pytest.approx(alone["peak_memory_bytes"], rel=0.01)
