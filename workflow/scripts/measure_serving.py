"""One job: hand a serving cell to `fastcache serving-cell` and come back with a row for every rate."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measure_cell import USER_ERROR, run

from fastcache.bench.row import failure, write_json
from fastcache.bench.serving.cells import ServingCell
from fastcache.bench.serving.row import blank_rows


def measure(cell: ServingCell, plan: Path, target: Path, command: list[str], log: Path) -> int:
    """Afterwards `target` holds a row per rate, unless 2 (the user's mistake) is returned."""
    code = run(cell, plan, target, command, log)
    if code == USER_ERROR:
        return USER_ERROR
    if code != 0 or not target.is_file():
        message = f"`{' '.join(command)}` ended with code {code} and left no rows; its messages are in {log}."
        problem = failure("crashed", "SupervisorDied", message)
        write_json(target, {"rows": [row | problem for row in blank_rows(cell)], "requests": {}})
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", type=json.loads, required=True, help="the cell as JSON")
    for option in ("--plan", "--rows", "--log"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("command", nargs="+", help="what measures a cell")
    args = parser.parse_args()
    code = measure(ServingCell.from_dict(args.cell), args.plan, args.rows, args.command, args.log)
    said = args.log.read_text(encoding="utf-8", errors="replace").splitlines()
    if code == USER_ERROR:
        sys.stderr.write("\n".join(said) + "\n")
        return USER_ERROR
    sys.stdout.write("\n".join(line for line in said if line.startswith("serving-")) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
