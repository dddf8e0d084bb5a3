"""Going on with an existing result file: which rows still stand, and which cells must run again. Pure but for reading.

A row stands if it is ok, its cell has the same full parameters (the id is made of all of them) and the same
source measured it. Rows of cells that are not in the present matrix are somebody's results and are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastcache.bench.cellconfig import CellConfig
from fastcache.errors import ResultFileError

NEEDED = ("cell_id", "status", "source_digest")


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; none if it does not exist. Errors: `ResultFileError`; the file stays as it is."""
    if not path.exists():
        return []
    remedy = "Move it away or name another --output; it was not changed."
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultFileError(f"cannot resume from {str(path)!r}: {error}. {remedy}") from None
    if not isinstance(rows, list):
        raise ResultFileError(f"cannot resume from {str(path)!r}: it is not a list of rows. {remedy}")
    for number, row in enumerate(rows):
        missing = [key for key in NEEDED if not isinstance(row, dict) or key not in row]
        if missing:
            raise ResultFileError(
                f"cannot resume from {str(path)!r}: entry {number} is no row of ours (no {missing[0]}). {remedy}"
            )
    return rows


def standing(
    rows: Iterable[dict[str, Any]], cells: Sequence[CellConfig], digest: str
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(rows of our cells that need no new measurement, by cell id; rows of other cells)."""
    wanted = {cell.id for cell in cells}
    kept = {
        row["cell_id"]: row
        for row in rows
        if row["cell_id"] in wanted and row["status"] == "ok" and row["source_digest"] == digest
    }
    return kept, [row for row in rows if row["cell_id"] not in wanted]
