"""Measure one cell described by a JSON file and write its row, whatever happens to the measurement.

The row's `status` tells how it went. The exit code is 0 when a row was written, and 2 when the file describes
no valid cell or the row cannot be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.row import check_writable, write_json
from fastcache.bench.warm import run_cell
from fastcache.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", type=Path, metavar="CELL.json", help="every parameter of the cell")
    parser.add_argument("--output", type=Path, required=True, metavar="ROW.json", help="where its row goes")


def run(args: argparse.Namespace) -> int:
    cell = CellConfig.from_dict(read_cell(args.cell))
    check_writable(args.output)
    row = run_cell(cell)
    write_json(args.output, row)
    what = row["error"]["message"] if row["error"] else f"{row['throughput_tok_s']:,.0f} tok/s"
    sys.stderr.write(f"{cell.id}: {row['status']}: {what}\n")
    return 0


def read_cell(path: Path) -> dict[str, Any]:
    """What a cell's file says. Errors: `ConfigError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a cell: {error}.") from None
