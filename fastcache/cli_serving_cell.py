"""Measure one engine under open-loop load, described by a JSON file, and write a row for each of its request rates.

The exit code is 0 when the rows were written, whatever their status, and 2 when the file describes no valid cell or
the result cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastcache.bench.row import check_writable, write_json
from fastcache.bench.serving.cells import ServingCell
from fastcache.bench.serving.supervise import run_serving
from fastcache.cli_cell import read_cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", type=Path, metavar="CELL.json", help="every parameter of the cell")
    parser.add_argument("--output", type=Path, required=True, metavar="ROWS.json", help="where its rows go")


def run(args: argparse.Namespace) -> int:
    cell = ServingCell.from_dict(read_cell(args.cell))
    check_writable(args.output)
    result = run_serving(cell)
    write_json(args.output, result)
    for row in result["rows"]:
        if row["error"]:
            what = row["error"]["message"]
        else:
            what = f"TTFT p50 {row['ttft_s']['p50']:.2f} s, {row['output_tok_s']:,.0f} generated tok/s"
        sys.stderr.write(f"{row['row_id']}: {row['status']}: {what}\n")
    return 0
