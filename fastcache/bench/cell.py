"""One cell measured: load once, warm up, run the timed rounds, tell what happened. Runs in a process for measuring.

`python -m fastcache.bench.cell CELL.json RESULT.json` is what the supervisor starts; it writes a result for
every error Python can catch. What it cannot catch (a kill, an abort, a hang) is the supervisor's to tell.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.metrics import middle_round, summarise
from fastcache.bench.options import common_options
from fastcache.bench.prompts import Vocabulary
from fastcache.bench.rounds import run_round, start_to_first_token, warm_up
from fastcache.bench.row import PARTITION_FIELDS, blank_row, failure, write_json
from fastcache.bench.supervise import die_with_parent
from fastcache.bench.work import utilisation
from fastcache.bench.workload import make_plan, shareable_tokens
from fastcache.config import CompressionConfig, PartitionConfig, ratio_of_factor
from fastcache.device import ceilings
from fastcache.device.clocks import ClockWatch
from fastcache.device.info import OtherLoad, device_info, peak_memory_bytes
from fastcache.errors import (
    DeviceOutOfMemory,
    OutOfPages,
    UnsupportedArchitecture,
    UnsupportedCombination,
    UserError,
)

log = logging.getLogger(__name__)

NOISY_SPREAD = 0.1
BUSY_SHARE = 0.1  # of the host's CPU threads: above it, other processes show in the times


def measure_cell(
    cell: CellConfig, make_llm: Callable[..., Any] | None = None, cells_before: int = 0
) -> dict[str, Any]:
    """The row of `cell`, whatever Python can catch. `make_llm` stands in for `fastcache.LLM` in tests; this process has
    measured `cells_before` other cells."""
    row = blank_row(cell) | {"process_cells_before": cells_before}
    try:
        if make_llm is None:
            from fastcache import LLM as make_llm
        _measure(cell, row, make_llm)
    except Exception as error:  # whatever goes wrong in one cell is that cell's result, not the matrix's end
        if not isinstance(error, UserError):
            log.exception("cell %s", cell.id)
        row |= failure(classify(error), type(error).__name__, str(error))
    return row


def _measure(cell: CellConfig, row: dict[str, Any], make_llm: Callable[..., Any]) -> None:
    """Fill `row`: the engine's facts as soon as they are known, the numbers only when all of them are."""
    llm = make_llm(**engine_options(cell))
    try:
        facts = llm.describe()
        row |= engine_facts(facts) | partition_facts(cell, facts)
        row["start_to_first_token_s"] = start_to_first_token(llm, row["process_cells_before"])
        limits = ceilings.measure(facts["device"])
        log.info("ceilings of this device: %s", limits)
        row |= {"ceiling_copy_bytes_s": limits.copy_bytes_s, "ceiling_gemm_flop_s": limits.gemm_flop_s}
        plan = make_plan(
            cell.workload,
            cell.batch_size,
            cell.warmup + cell.repeats,
            cell.seed,
            vocabulary(llm, facts),
            facts["max_model_len"],
        )
        warm_up(llm, plan.rounds[: cell.warmup], row["device"]["kind"], cell.tuning != "off")
        others, clocks = OtherLoad(), ClockWatch(facts["device"])
        timed = [run_round(llm, batches) for batches in plan.rounds[cell.warmup :]]
        busy, row["clocks"] = others.cores(), clocks.stop()
        memory = peak_memory_bytes(facts["device"])
        row["decisions"] = llm.decisions() if cell.tuning != "off" else None
    finally:
        llm.close()
    planned = [request for batch in plan.rounds[cell.warmup] for request in batch]
    prompts = [request.content or request.prompt_token_ids for request in planned]
    middle = middle_round(timed)
    requests = [output.metrics for output in middle.outputs]
    row |= utilisation(llm.model_config, facts, requests, middle.stats, limits)
    row |= summarise(timed) | {
        "status": "ok",
        "text_source": plan.text_source,
        "context_used": plan.context_used,
        "output_used": plan.output_used,
        "peak_memory_bytes": memory,
        "shareable_prefix_tokens": shareable_tokens(prompts, cell.page_size),
    }
    said = busy_host(row["device"], busy)
    row["host_busy"] = bool(said)
    row["notes"] = plan.notes + notes(cell, row) + said


def engine_options(cell: CellConfig) -> dict[str, Any]:
    """A variant as engine settings: compression on from compression-only up, partitions on from greenctx-only."""
    compression = partition = None
    if cell.compressed:
        ratio = ratio_of_factor(cell.compression_factor)
        compression = CompressionConfig(str(cell.method), ratio, cell.method_params, cell.head_budgets)
    if cell.greenctx:
        partition = PartitionConfig(
            enabled=True,
            compress_ratio=cell.greenctx_compress_ratio,
            main_ratio=cell.greenctx_main_ratio,
            main_stream=cell.greenctx_main_stream,
            require=cell.require_greenctx,
            bound=cell.greenctx_bound,
        )
    return {
        **common_options(cell),
        "max_num_seqs": cell.batch_size,
        "tuning": cell.tuning,
        "compression": compression,
        "partition": partition or PartitionConfig(),
    }


def engine_facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_backend": facts["attention_backend"],
        "dtype": facts["dtype"],
        "kv_dtype": facts["kv_dtype"],
        "kv_bytes_per_token": facts["kv_bytes_per_token"],
        "num_pages": facts["num_pages"],
        "max_model_len": facts["max_model_len"],
        "weights": {name: facts["weights"][name] for name in ("kind", "sha256")},
        "compressor": facts.get("compressor"),
        "device": device_info(facts["device"]),
    }


def partition_facts(cell: CellConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What became of the partition, from the engine's own report; nothing where none was asked for.

    Errors: `UnsupportedCombination` if the cell requires green contexts and there are none.
    """
    if not cell.greenctx:
        return {}
    report = facts.get("partition") or {
        "greenctx_available": False,
        "greenctx_reason": _no_report(facts["device"]),
    }
    if cell.require_greenctx and not report["greenctx_available"]:
        raise UnsupportedCombination(
            f"require_greenctx is set and there are no green contexts: {report['greenctx_reason']}. Unset it "
            "to run on plain streams, which the row then says."
        )
    return {name: report.get(name) for name in PARTITION_FIELDS}


def _no_report(device: str) -> str:
    if device.startswith("cpu"):
        return "the device is a CPU, which has no SMs to partition"
    return "the engine reported no partition, so everything ran on the whole GPU"


def notes(cell: CellConfig, row: dict[str, Any]) -> list[str]:
    """What a reader must know to read this row rightly."""
    said = []
    if cell.greenctx and not row["greenctx_available"]:
        said.append(f"no green contexts: {row['greenctx_reason']}")
    if row["decisions"] is not None:
        said += decided(row["decisions"])
    elif cell.compressed and row["uncompressed_requests"]:
        said.append(f"{row['uncompressed_requests']} requests were not compressed: too short for the method")
    if row["weights"]["kind"] == "dummy":
        said.append("weights are seeded random numbers: speed is meaningful, text is not")
    if row["repeats"]["spread"] > NOISY_SPREAD:
        said.append(f"noisy: the repeats differ by {row['repeats']['spread']:.0%} of their median")
    if row["prefix_hit_tokens"]:
        said.append(
            f"{row['prefix_hit_tokens']} prompt tokens came from the prefix cache and were not computed"
        )
    return said


def decided(decisions: dict[str, Any]) -> list[str]:
    """The last round's decisions about compression in words, most frequent first."""
    said = []
    for each in decisions["decisions"]:
        if each["about"] == "compression":
            line = f"{each['count']} requests {each['choice']}: {each['reason']}"
            point = each["outcome"]["break_even"]
            said.append(line if point is None else f"{line} (break-even at {point:.0f} output tokens)")
    return said


def busy_host(device: dict[str, Any], busy: float) -> list[str]:
    """Only a CPU run shares its device with whatever else the machine does."""
    threads = os.cpu_count() or 1
    if device["kind"] != "cpu" or busy < BUSY_SHARE * threads:
        return []
    return [
        f"other processes kept {busy:.1f} of {threads} CPU threads busy meanwhile: its times are too long"
    ]


def classify(error: BaseException) -> str:
    """The status of a row whose cell ended with `error`."""
    if isinstance(error, DeviceOutOfMemory | OutOfPages | MemoryError):
        return "oom"
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "oom"  # torch's own, on CUDA and on the CPU
    if isinstance(error, UnsupportedCombination | UnsupportedArchitecture):
        return "unsupported"
    return "failed"


def vocabulary(llm: Any, facts: dict[str, Any]) -> Vocabulary:
    return Vocabulary(
        llm.model_config.vocab_size,
        _encoder(llm.tokenizer),
        facts.get("image_token_id"),
        facts.get("tokens_per_image"),
    )


def _encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    """Windows of a text are not messages: they get no begin-of-sequence token."""
    if tokenizer is None:
        return None
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def main(arguments: list[str]) -> None:
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    source, target = map(Path, arguments)
    cell = CellConfig.from_dict(json.loads(source.read_text(encoding="utf-8")))
    write_json(target, measure_cell(cell))


if __name__ == "__main__":
    main(sys.argv[1:])
