"""Measure the quality of one compressed cache, described by a JSON file, and write its row whatever happens to it.

The exit code is 0 when a row was written, and 2 when the file describes no valid cell or the row cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastcache.bench.quality.cells import QualityCell
from fastcache.bench.quality.row import blank_row
from fastcache.bench.row import check_writable, write_json
from fastcache.bench.supervise import run_cell
from fastcache.cli_cell import read_cell

CHILD = (sys.executable, "-m", "fastcache.bench.quality.measure")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", type=Path, metavar="CELL.json", help="every parameter of the cell")
    parser.add_argument("--output", type=Path, required=True, metavar="ROW.json", help="where its row goes")


def run(args: argparse.Namespace) -> int:
    cell = QualityCell.from_dict(read_cell(args.cell))
    check_writable(args.output)
    row = run_cell(cell, CHILD, blank_row)
    write_json(args.output, row)
    what = row["error"]["message"] if row["error"] else f"measured in {row['elapsed_s']:.0f} s"
    sys.stderr.write(f"{cell.id}: {row['status']}: {what}\n")
    return 0
