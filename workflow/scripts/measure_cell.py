"""One job: hand a cell to `fastcache cell` and come back with its row, even if that process is killed.

`fastcache cell` already turns what happens to the measuring process into a row. This wrapper covers the rest:
a supervisor that dies itself becomes a `crashed` row, a mistake of the user (exit 2) fails the job with the
user's message, and if Snakemake is killed the measurement ends with it, so that a restart finds a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import progress
import reproduction
from gpu_token import VARIABLE, take, visible_devices, wanted

from fastcache.bench.matrix import CellConfig
from fastcache.bench.quality.cells import QualityCell
from fastcache.bench.quality.row import blank_row as blank_quality_row
from fastcache.bench.row import blank_row, failure, write_json
from fastcache.config import StrictConfig

KINDS = {"speed": CellConfig, "quality": QualityCell}
BLANK = {CellConfig: blank_row, QualityCell: blank_quality_row}
USER_ERROR = 2
HISTORY = Path("results/history.jsonl")  # every measurement, so that a later one can be held against it
POLL_S = 0.5
GRACE_S = 5.0


def measure(cell: CellConfig | QualityCell, plan: Path, target: Path, command: list[str], log: Path) -> int:
    """Run `command PLAN --output TARGET`; afterwards TARGET holds a row, unless 2 (the user's mistake) is returned."""
    code = run(cell, plan, target, command, log)
    if code == USER_ERROR:
        return USER_ERROR
    if code != 0 or read_row(target, cell) is None:
        message = f"`{' '.join(command)}` ended with code {code} and left no row; its messages are in {log}."
        write_json(target, BLANK[type(cell)](cell) | failure("crashed", "SupervisorDied", message))
    return 0


def run(cell: StrictConfig, plan: Path, target: Path, command: list[str], log: Path) -> int:
    """The exit code of `command PLAN --output TARGET`; what was in TARGET before is gone."""
    write_json(plan, cell.to_dict())
    target.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen([*command, str(plan), "--output", str(target)], stdout=out, stderr=out)
        return wait_while_wanted(child)


def wait_while_wanted(child: subprocess.Popen[Any]) -> int:
    """The child's exit code. Ends it, and this process, as soon as nobody waits for the result any more."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: give_up(child))
    while True:
        try:
            return child.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                give_up(child)


def give_up(child: subprocess.Popen[Any]) -> NoReturn:
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
    raise SystemExit(1)


def read_row(path: Path, cell: CellConfig | QualityCell) -> dict[str, Any] | None:
    """The row, or None if there is none or it is not this cell's."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return row if isinstance(row, dict) and row.get("cell_id") == cell.id else None


def summary(row: dict[str, Any], seconds: float) -> str:
    """The line a person watches the run by."""
    if row["status"] != "ok":
        return f"{row['status']:>11}  {row['cell_id']}: {row['error']['message']}"
    if "tasks" in row:
        return f"{len(row['tasks'])} tasks  {row['cell_id']}  (cell took {seconds:.0f} s)"
    speed, first = row["throughput_tok_s"], row["ttft_s"]["p50"]
    return f"{speed:>6.0f} tok/s  {row['cell_id']}  (TTFT {first:.2f} s; cell took {seconds:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="speed")
    parser.add_argument("--cell", type=json.loads, required=True, help="the cell as JSON")
    for option in ("--plan", "--row", "--log"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("command", nargs="+", help="what measures a cell")
    args = parser.parse_args()
    cell = KINDS[args.kind].from_dict(args.cell)
    devices = visible_devices() if wanted(cell.device) else []
    if devices:
        os.environ[VARIABLE], _token = take(devices)  # the token is given back when this process ends
    os.environ["FASTCACHE_RUN_PID"] = str(
        os.getppid()
    )  # with the run ends a process that waits for its next cell
    started = time.monotonic()
    code = measure(cell, args.plan, args.row, args.command, args.log)
    if code == USER_ERROR:
        sys.stderr.write(args.log.read_text(encoding="utf-8", errors="replace"))
        return USER_ERROR
    seconds = time.monotonic() - started
    row = json.loads(args.row.read_text(encoding="utf-8"))
    left = None
    if args.kind == "speed":
        reproduction.remember(row, HISTORY)
        left = progress.left(cell.id, seconds)
    sys.stdout.write(summary(row, seconds) + "\n")
    if left is not None:
        sys.stdout.write(f"{'':>14}{left}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
