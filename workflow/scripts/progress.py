"""What a run will cost, said when it starts, and what is left of it, said after each cell."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastcache.bench.estimate import Estimate, estimates, from_json, outlook, smallest_gpu_gib, to_json
from fastcache.bench.matrix import CellConfig
from fastcache.bench.provenance import source_digest

ESTIMATES = Path("results/estimate.json")
PUBLISHED = Path("results/published")


def estimate(
    cells: Mapping[str, CellConfig], base: Path, memory_gib: float | None
) -> dict[str, Estimate | None]:
    """Of every cell, from rows of this checkout and published ones; `memory_gib`: the config's, else the driver's."""
    if memory_gib is None and any(cell.device != "cpu" for cell in cells.values()):
        memory_gib = smallest_gpu_gib()
    return estimates(cells.values(), earlier_rows(cells, base), memory_gib)


def announce(found: Mapping[str, Estimate | None], quality: Iterable[str], at_once: int) -> str:
    """Keep the estimates for `left`, and say what those cells cost that have no row yet. `quality`: ids of quality
    cells, whose number is said beside."""
    ESTIMATES.parent.mkdir(exist_ok=True)
    ESTIMATES.write_text(
        json.dumps({"at_once": at_once, "cells": to_json(found)}, indent=1), encoding="utf-8"
    )
    missing = {cell: entry for cell, entry in found.items() if not stands(cell)}
    others = sum(not Path("results/quality", f"{cell}.json").is_file() for cell in quality)
    beside = f"; then {others} of quality, whose time no row tells" if others else ""
    return f"{outlook(missing, {}, at_once)}{beside}"


def left(now: str, seconds: float) -> str | None:
    """What remains after cell `now`, which took `seconds`; None in a run that announced nothing (one cell by hand)."""
    try:
        content = json.loads(ESTIMATES.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    found = from_json(content["cells"])
    took = {cell: took_of(cell) for cell in found if stands(cell)} | {now: seconds}
    return str(outlook(found, {c: s for c, s in took.items() if s is not None}, content["at_once"]))


def stands(cell: str) -> bool:
    """Whether there is a row that the present source measured."""
    try:
        return json.loads(row_of(cell).read_text(encoding="utf-8"))["source_digest"] == source_digest()
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def row_of(cell: str) -> Path:
    return Path("results/cells", f"{cell}.json")


def took_of(cell: str) -> float | None:
    """Seconds of the whole job, as Snakemake's benchmark file has them."""
    try:
        with Path("results/benchmarks/cells", f"{cell}.tsv").open(encoding="utf-8") as lines:
            return float(next(csv.DictReader(lines, delimiter="\t"))["s"])
    except (OSError, StopIteration, KeyError, ValueError):
        return None


def earlier_rows(cells: Iterable[str], base: Path) -> list[dict[str, Any]]:
    """Rows of this checkout first, then the published ones."""
    own = [json.loads(row_of(cell).read_text(encoding="utf-8")) for cell in cells if row_of(cell).is_file()]
    published = []
    for file in sorted((base / PUBLISHED).glob("*/rows.jsonl")):
        published += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return own + published
