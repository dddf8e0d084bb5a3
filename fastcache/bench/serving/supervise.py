"""Runs a serving cell in a child process and always comes back with a row for every rate. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fastcache.bench.serving.cells import ServingCell
from fastcache.bench.serving.row import blank_rows
from fastcache.bench.supervise import run_child

CHILD = (sys.executable, "-m", "fastcache.bench.serving.cell")


def run_serving(cell: ServingCell, command: Sequence[str] = CHILD) -> dict[str, Any]:
    """{"rows": one per rate, "requests": {row id: records}}. Rates that were measured before the end stay measured."""
    wrote, problem = run_child(cell.to_dict(), cell.timeout_s, command)
    result = wrote or {"rows": blank_rows(cell), "requests": {}}
    for row in result["rows"]:
        if row["status"] is None:
            row |= problem
    return result
