"""Measure every combination of models, workloads, batch sizes and variants, and write one JSON list of rows.

A baseline row is measured for each (model, workload, batch size), so that every row has a speed-up. Each cell
runs in a process of its own; the file is rewritten after each, so an interrupted run loses at most one cell.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastcache.bench.datasets import read_prompts, read_trace
from fastcache.bench.estimate import estimates, outlook
from fastcache.bench.matrix import CellConfig, Expansion, expand
from fastcache.bench.provenance import source_digest
from fastcache.bench.resume import load_rows, standing
from fastcache.bench.row import check_writable, write_json
from fastcache.bench.table import enrich, format_table
from fastcache.bench.warm import run_cell
from fastcache.cli_matrix import add_arguments, matrix_config
from fastcache.errors import ModelFolderError

__all__ = ["add_arguments", "run"]

# Errors that the person who typed the command can mend: with one of these in a row the exit code is 2.
USER_MISTAKES = (
    "ConfigError",
    "DatasetError",
    "ModelFolderError",
    "PromptTooLong",
    "UnknownName",
    "UnsupportedArchitecture",
    "UnsupportedCombination",
)
FAILED_CELL, USER_MISTAKE = 1, 2


def run(args: argparse.Namespace) -> int:
    """Measure the matrix. Exit code: 0 all ok, 1 a cell failed, 2 one failed by something the user can mend."""
    expansion = expand(matrix_config(args))
    check_writable(args.output)
    rows, others = {}, []
    if args.resume:
        rows, others = standing(load_rows(args.output), expansion.cells, source_digest())
    _check_inputs(args, expansion)
    _report_plan(expansion, len(rows))
    missing = [cell for cell in expansion.cells if cell.id not in rows]
    expected, took = estimates(missing, [*rows.values(), *others]), {}
    for number_, cell in enumerate(missing, start=len(rows) + 1):
        sys.stderr.write(f"{outlook(expected, took)}\n")
        started = time.monotonic()
        rows[cell.id] = _measure(cell, f"[{number_}/{len(expansion.cells)}]")
        took[cell.id] = time.monotonic() - started
        write_json(args.output, _ordered(rows, expansion.cells, others))
    table = _ordered(rows, expansion.cells, others)
    write_json(args.output, table)
    sys.stdout.write(f"{format_table(table)}\n\n{len(table)} rows in {args.output}\n")
    return exit_code(rows.values())


def exit_code(rows: Iterable[dict[str, Any]]) -> int:
    kinds = [row["error"]["type"] for row in rows if row["status"] != "ok"]
    if not kinds:
        return 0
    return USER_MISTAKE if any(kind in USER_MISTAKES for kind in kinds) else FAILED_CELL


def _check_inputs(args: argparse.Namespace, expansion: Expansion) -> None:
    """Find what is missing before the first cell runs, not in the middle of the night."""
    for path in {cell.model_path for cell in expansion.cells if cell.model_path}:
        if not Path(path).is_dir():
            raise ModelFolderError(
                f"model folder {path!r} does not exist. Give the path of a local Hugging Face folder "
                "(config.json and *.safetensors)."
            )
    workloads = {cell.workload.name for cell in expansion.cells}
    if "light-dataset" in workloads:
        read_prompts(args.dataset_dir)
    if "heavy-trace" in workloads:
        read_trace(args.trace_conv)


def _report_plan(expansion: Expansion, kept: int) -> None:
    resumed = f", {kept} of them kept from the file" if kept else ""
    sys.stderr.write(f"{len(expansion.cells)} cells{resumed}\n")
    for excluded in expansion.excluded:
        sys.stderr.write(f"left out ({excluded.rule}): {excluded.cell.id}: {excluded.reason}\n")


def _measure(cell: CellConfig, place: str) -> dict[str, Any]:
    sys.stderr.write(f"{place} {cell.id} ...\n")
    sys.stderr.flush()
    started = time.monotonic()
    row = run_cell(cell)
    seconds = time.monotonic() - started
    if row["status"] == "ok":
        what = f"{row['throughput_tok_s']:,.0f} tok/s"
    else:
        what = f"{row['error']['type']}: {row['error']['message']}"
    sys.stderr.write(f"{place} {row['status']} after {seconds:.0f} s: {what}\n")
    return row


def _ordered(
    rows: dict[str, Any], cells: list[CellConfig], others: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    return enrich([rows[cell.id] for cell in cells if cell.id in rows] + others)
