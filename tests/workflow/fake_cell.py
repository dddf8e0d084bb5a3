"""Stands in for `fastcache cell`: real supervision around a child that measures nothing, or ends badly on purpose.

    fake_cell.py PLAN --output ROW

FAKE_FAULTS is a JSON mapping from a part of a cell id to what happens to that cell; every start is noted in
`measured.txt` in the working directory, and in `devices.txt` which device each had from when to when. It waits until
FAKE_TOGETHER cells have started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from fastcache.bench import warm, worker
from fastcache.bench.matrix import CellConfig
from fastcache.bench.provenance import source_digest
from fastcache.bench.row import write_json
from fastcache.bench.supervise import die_with_parent


def fault_of(cell: CellConfig) -> str:
    faults = json.loads(os.environ.get("FAKE_FAULTS", "{}"))
    return next((fault for part, fault in faults.items() if part in cell.id), "none")


def supervise(plan: Path, target: Path) -> int:
    cell = CellConfig.from_dict(json.loads(plan.read_text(encoding="utf-8")))
    with Path("measured.txt").open("a", encoding="utf-8") as note:
        note.write(cell.id + "\n")
    fault = fault_of(cell)
    if fault == "user-error":
        sys.stderr.write("compression_factor is 0; allowed is a number above 1.\n")
        return 2
    if fault == "supervisor-killed":
        os.kill(os.getpid(), signal.SIGKILL)
    warm.WORKER = (sys.executable, __file__, "--worker")
    write_json(target, warm.run_cell(cell, (sys.executable, __file__)))
    return 0


def measure(content: dict, cells_before: int) -> dict:
    from rows import failed_row, row

    cell = CellConfig.from_dict(content)
    fault = fault_of(cell)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    together = int(os.environ.get("FAKE_TOGETHER", "1"))
    while len(Path("measured.txt").read_text(encoding="utf-8").split()) < together:
        time.sleep(0.05)
    with Path("devices.txt").open("a", encoding="utf-8") as note:
        note.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {started} {time.monotonic()}\n")
    if fault == "hang":
        time.sleep(600)
    made = failed_row(cell, fault, f"injected {fault}") if fault in ("oom", "failed") else row(cell)
    with Path("processes.txt").open("a", encoding="utf-8") as note:
        note.write(f"{os.getpid()} {cells_before}\n")
    sys.stderr.write(f"said by {cell.id}\n")
    return made | {"source_digest": source_digest(), "process_cells_before": cells_before}


def measure_alone(source: Path, target: Path) -> None:
    die_with_parent()
    write_json(target, measure(json.loads(source.read_text(encoding="utf-8")), 0))


if __name__ == "__main__":
    if "--output" in sys.argv:
        raise SystemExit(supervise(Path(sys.argv[1]), Path(sys.argv[3])))
    if sys.argv[1] == "--worker":
        worker.main(sys.argv[2:], measure)
    measure_alone(Path(sys.argv[1]), Path(sys.argv[2]))
