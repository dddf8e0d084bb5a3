"""One engine measured at all its rates, lowest first. Runs in its own process, as matrix cells do.

`python -m fastcache.bench.serving.cell CELL.json RESULT.json` writes {"rows": [...], "requests": {row id: [...]}} after
every rate, so that a process that dies loses only what it had not measured.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcache.bench.cell import busy_host, classify, engine_facts, vocabulary
from fastcache.bench.options import common_options
from fastcache.bench.row import failure, write_json
from fastcache.bench.serving.cells import FULL, TRIAD, ServingCell
from fastcache.bench.serving.drive import drive, warm_up
from fastcache.bench.serving.metrics import request_records, summarise
from fastcache.bench.serving.row import ENGINE_FACTS, blank_rows
from fastcache.bench.serving.workload import plan_arrivals
from fastcache.bench.supervise import die_with_parent
from fastcache.config import STATIC_POLICY, CompressionConfig, PartitionConfig, ratio_of_factor
from fastcache.device.info import OtherLoad
from fastcache.errors import UserError

log = logging.getLogger(__name__)
CPU_WARMUP_SEQS = 2
# Of other arrivals: what only load brings up is compiled, and an engine that decides measures its costs.
UNTIMED_S = 3.0
# Share of the SMs that triad may take for compression, as in config/triad.yaml.
COMPRESS_RATIO = 0.125


def measure(cell: ServingCell, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The rows of `cell`, whatever Python can catch; `save` gets all that is known after every rate."""
    result: dict[str, Any] = {"rows": blank_rows(cell), "requests": {}}
    try:
        _measure(cell, result, save)
    except Exception as error:  # whatever goes wrong is the result of the rates that were not measured
        if not isinstance(error, UserError):
            log.exception("cell %s", cell.id)
        for row in result["rows"]:
            if row["status"] is None:
                row |= failure(classify(error), type(error).__name__, str(error))
    return result


def _measure(cell: ServingCell, result: dict[str, Any], save: Callable[..., None]) -> None:
    from fastcache import LLM  # here, as it loads torch: what goes wrong with that becomes rows, too

    llm = LLM(**engine_options(cell))
    try:
        facts = llm.describe()
        known = {name: value for name, value in engine_facts(facts).items() if name in ENGINE_FACTS}
        for row in result["rows"]:
            row |= known
        words = vocabulary(llm, facts)
        page_bytes = facts["kv_bytes_per_token"] * facts["page_size"]
        kind, warm = known["device"]["kind"], False
        for row in result["rows"]:
            arrivals = plan_arrivals(cell.workload, row["rate"], cell.window_s, cell.seed, words)
            if not warm:
                warm_up(llm, arrivals, CPU_WARMUP_SEQS if kind == "cpu" else warm_sequences(cell))
                if kind != "cpu" or cell.variant == TRIAD:
                    before = plan_arrivals(cell.workload, row["rate"], UNTIMED_S, cell.seed + 1, words)
                    llm.explore(freely=True)
                    drive(llm, before, UNTIMED_S + cell.drain_s)
                    llm.explore(freely=False)
                warm = True
            others = OtherLoad()
            recording = drive(llm, arrivals, cell.window_s + cell.drain_s)
            said = busy_host(known["device"], others.cores())
            row |= summarise(cell, recording, page_bytes)
            row["decisions"] = llm.decisions() if cell.variant == TRIAD else None
            row |= {"status": "ok", "host_busy": bool(said), "notes": notes(row, facts) + said}
            result["requests"][row["row_id"]] = request_records(recording)
            save(result)
    finally:
        llm.close()


def warm_sequences(cell: ServingCell) -> int:
    """So many that every batch size comes up that this policy can have, but a policy with small batches need not work
    through a full engine's requests."""
    static = re.fullmatch(STATIC_POLICY, cell.policy)
    largest = max(map(int, static.groups())) if static else cell.max_num_seqs
    return min(cell.max_num_seqs, 4 * largest)


def engine_options(cell: ServingCell) -> dict[str, Any]:
    compression = None
    if cell.method != FULL:
        ratio = ratio_of_factor(cell.compression_factor)
        compression = CompressionConfig(cell.method, ratio, params=dict(cell.method_params))
    return {
        **common_options(cell),
        "max_num_seqs": cell.max_num_seqs,
        "compression": compression,
        **(triad_options(cell) if cell.variant == TRIAD else {}),
    }


def triad_options(cell: ServingCell) -> dict[str, Any]:
    """It may take SMs for compression, or divide them between prefill and decode, and need not."""
    bound = PartitionConfig(True, COMPRESS_RATIO, 1 - COMPRESS_RATIO, bound=True)
    return {"tuning": "all", "tpot_bound_s": cell.slo_tpot_s, "partition": bound}


def notes(row: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """What a reader must know to read this row rightly. facts: of `LLM.describe`."""
    said, partition = [], facts.get("partition") or {}
    if partition.get("greenctx_available") is False:
        said.append(f"no SMs could be set apart: {partition['greenctx_reason']}")
    left = row["requests"] - row["finished"]
    if left:
        said.append(
            f"{left} of {row['requests']} requests were not done {row['elapsed_s']:.0f} s after the start and were "
            f"ended; {row['without_first_token']} of them had no token, and count in TTFT with what they had waited"
        )
    if row["too_short_to_compress"]:
        said.append(f"{row['too_short_to_compress']} requests were not compressed: too short for the method")
    if (row["compressor"] or {}).get("kind") == "dummy":
        said.append(
            "the compressor's networks are seeded random numbers, like the model: their speed is meaningful, alone"
        )
    if row["weights"]["kind"] == "dummy":
        said.append("weights are seeded random numbers: speed is meaningful, text is not")
    return said


def main(arguments: list[str]) -> None:
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    source, target = map(Path, arguments)
    cell = ServingCell.from_dict(json.loads(source.read_text(encoding="utf-8")))
    write_json(target, measure(cell, lambda result: write_json(target, result)))


if __name__ == "__main__":
    main(sys.argv[1:])
