"""How long cells will take, before they are measured: from earlier rows, or counted work at rates that rows have shown.

Nothing is assumed about a machine: where no row tells its rates, a cell has no estimate until one of this run does.
Imports no torch.
"""

from __future__ import annotations

import heapq
import math
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.compare import work_of
from fastcache.bench.fits import GIB, dtype_of, kv_bytes_per_token, shape_of
from fastcache.bench.work import ITEM_BYTES, prefill_flops, step_bytes

Row = Mapping[str, Any]
# Tokens of each request in a warm-up round (see `rounds.warmup_tokens`); seconds of a cell that are neither start nor
# requests: the supervisor, the ceilings, writing the row.
WARMUP_TOKENS = {"cuda": 3, "cpu": 16}
AROUND_S = 2.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of one cell, start and warm-up included. `source`: what they were taken from, in words."""

    seconds: float
    source: str


@dataclass(frozen=True)
class Rates:
    """What cells of one kind of device have shown: medians over rows, and the mean of what a process's start cost."""

    start_s: float
    prefill_flop_s: float
    decode_bytes_s: float
    memory_bytes: int | None
    device: str


def estimates(
    cells: Iterable[CellConfig], rows: Sequence[Row], memory_gib: float | None = None
) -> dict[str, Estimate | None]:
    """An estimate for each cell id, None where nothing is known. Rows that come first are preferred. `memory_gib`: of
    the GPU that is there, which decides how many requests it holds at once; None takes that of the rows' GPU."""
    known = [row for row in rows if row["status"] == "ok"]
    by_work: dict[str, Row] = {}
    for row in known:
        by_work.setdefault(work_of(row), row)
    rates = {kind: rates_of([r for r in known if r["device"]["kind"] == kind]) for kind in ("cuda", "cpu")}
    if rates["cuda"] is not None and memory_gib is not None:
        rates["cuda"] = replace(rates["cuda"], memory_bytes=int(memory_gib * GIB))
    found: dict[str, Estimate | None] = {}
    for cell in cells:
        row = by_work.get(work_of({"cell": cell.to_dict(), "cell_id": cell.id}))
        found[cell.id] = from_row(cell, row) if row is not None else from_rates(cell, rates)
    return found


def from_row(cell: CellConfig, row: Row) -> Estimate:
    """The cell was measured before, though perhaps with other repeats."""
    prefill = row["prompt_tokens"] / row["prefill_tok_s"] if row["prefill_tok_s"] else 0.0
    tokens = WARMUP_TOKENS[row["device"]["kind"]]
    warmup = prefill + max(row["elapsed_s"] - prefill, 0.0) * min(1.0, tokens / cell.workload.output)
    start = row.get("start_to_first_token_s") or 0.0
    seconds = AROUND_S + start + cell.warmup * warmup + cell.repeats * row["elapsed_s"]
    return Estimate(seconds, f"measured before on {row['device']['name']}")


def rates_of(rows: Sequence[Row]) -> Rates | None:
    """Median rates of rows that have their ceilings and shares; None if none has."""
    full = [r for r in rows if r.get("prefill_mfu") and r.get("decode_mbu")]
    if not full:
        return None
    return Rates(
        # A cell whose process had measured another one started no process: what a cell cost at its start, on average.
        statistics.fmean(r.get("start_to_first_token_s") or 0.0 for r in full),
        statistics.median(r["prefill_mfu"] * r["ceiling_gemm_flop_s"] for r in full),
        statistics.median(r["decode_mbu"] * r["ceiling_copy_bytes_s"] for r in full),
        full[0]["device"].get("memory_bytes"),
        full[0]["device"]["name"],
    )


def from_rates(cell: CellConfig, rates: Mapping[str, Rates | None]) -> Estimate | None:
    """Counted FLOPs and bytes at the rates that other cells reached."""
    kind = _kind(cell.device)
    rate, shape = rates[kind], shape_of(cell.model, cell.model_path)
    if rate is None or shape is None:
        return None
    requests = (cell.workload.requests or cell.batch_size) * cell.workload.num_batches
    prompt = min(cell.workload.context, cell.model_len - cell.workload.output)
    prefill = requests * prefill_flops(shape, 0, prompt) / rate.prefill_flop_s
    dtype, steps = dtype_of(cell, shape), cell.workload.output - 1
    kept = prompt / (cell.compression_factor or 1)
    per_token = kv_bytes_per_token(shape, dtype, cell.kv_dtype)
    waves = math.ceil(requests / _at_once(cell, shape, rate, per_token, kept))
    entries = requests * (steps * kept + steps * (steps + 1) / 2)
    decode = (waves * steps * step_bytes(shape, dtype) + per_token * entries) / rate.decode_bytes_s
    warmup = prefill + decode * min(1.0, WARMUP_TOKENS[kind] / cell.workload.output)
    seconds = AROUND_S + rate.start_s + cell.warmup * warmup + cell.repeats * (prefill + decode)
    return Estimate(seconds, f"counted work at rates seen on {rate.device}")


def _kind(device: str) -> str:
    """ "auto" is the GPU of a machine that has NVIDIA's tools: rows of another kind of machine say nothing here."""
    if device == "auto":
        return "cuda" if shutil.which("nvidia-smi") else "cpu"
    return device.split(":")[0]


@cache
def smallest_gpu_gib() -> float | None:
    """Memory of the smallest GPU that the driver tells of; None where there is no driver or it does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return min(float(mib) for mib in answer.splitlines() if mib.strip()) / 1024
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _at_once(cell: CellConfig, shape: Any, rate: Rates, per_token: int, kept: float) -> int:
    """Requests that decode together: the batch, or as many as the KV pool holds."""
    held = per_token * (kept + cell.workload.output)
    if cell.num_pages is not None:
        room = cell.num_pages * cell.page_size * per_token
    elif _kind(cell.device) == "cpu" or rate.memory_bytes is None:
        return cell.batch_size
    else:
        weights = shape.num_parameters * ITEM_BYTES[dtype_of(cell, shape)]
        room = rate.memory_bytes * cell.gpu_mem_util - weights
    return max(1, min(cell.batch_size, int(room / held)))


@dataclass(frozen=True)
class Outlook:
    """A run before or while it happens. `seconds` until its last cell ends, with `at_once` of them at a time; it counts
    the estimated cells alone, None if there are none."""

    cells: int
    seconds: float | None
    unknown: int
    at_once: int = 1

    def __str__(self) -> str:
        what = f"{self.cells} cell" + ("s" if self.cells != 1 else "")
        if self.seconds is None:
            return f"{what} to measure; no earlier row tells how long they take"
        rest = f", and {self.unknown} without an estimate" if self.unknown else ""
        on = f" on {self.at_once} GPUs" if self.at_once > 1 else ""
        return f"{what} to measure, about {duration(self.seconds)}{on}{rest}"


def outlook(found: Mapping[str, Estimate | None], took: Mapping[str, float], at_once: int = 1) -> Outlook:
    """What is left when the cells in `took` (id -> seconds) are done, corrected by how far those were off.

    Cells without an estimate are taken to last as long as the mean cell that is done.
    """
    left = [cell for cell in found if cell not in took]
    both = [(took[cell], found[cell].seconds) for cell in took if found.get(cell)]
    pace = sum(t for t, _ in both) / sum(e for _, e in both) if both else 1.0
    known = [found[cell].seconds * pace for cell in left if found[cell]]
    unknown = [cell for cell in left if not found[cell]]
    if unknown and took:
        known += [statistics.fmean(took.values())] * len(unknown)
        unknown = []
    seconds = last_end(known, at_once) if known or not left else None
    return Outlook(len(left), seconds, len(unknown), at_once)


def last_end(seconds: Iterable[float], at_once: int) -> float:
    """When the last of these ends, if the longest waiting one starts wherever one of `at_once` places is free."""
    ends = [0.0] * at_once
    for each in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1.5:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def to_json(found: Mapping[str, Estimate | None]) -> dict[str, dict[str, Any] | None]:
    return {cell: asdict(entry) if entry else None for cell, entry in found.items()}


def from_json(content: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Estimate | None]:
    return {cell: Estimate(**entry) if entry else None for cell, entry in content.items()}
