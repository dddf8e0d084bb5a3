"""What the report's appendix says of the rows' own reproducibility: pure functions of them and of what came before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from findings import Row

HISTORY = ("cell_id", "started_at", "status", "git_commit", "source_digest", "throughput_tok_s")
# A row's field -> what a reader calls it, and its unit.
SENSORS = {
    "sm_mhz": ("SM clock", "MHz"),
    "memory_mhz": ("memory clock", "MHz"),
    "temperature_c": ("temperature", "°C"),
    "power_w": ("power", "W"),
}


def remember(row: Row, history: Path) -> None:
    """Add what a later measurement of the cell is compared with; one write, so that parallel jobs do not mix."""
    history.parent.mkdir(exist_ok=True)
    with history.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: row[name] for name in HISTORY}) + "\n")


def recall(history: Path | None) -> list[Row]:
    if history is None or not history.is_file():
        return []
    return [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]


def drifts(rows: Sequence[Row], history: Sequence[Row]) -> list[dict[str, Any]]:
    """Cells that were measured more than once, the largest change first.

    `change`: throughput of the latest over the median of all before it, less 1. `same_source`: whether one source
    measured all of them, so that the change is the machine's and not the engine's.
    """
    seen: dict[str, dict[str, Row]] = {}
    for row in (*history, *rows):
        if row["status"] == "ok":
            seen.setdefault(row["cell_id"], {})[row["started_at"]] = row
    found = []
    for cell, times in seen.items():
        *before, last = (times[moment] for moment in sorted(times))
        if before:
            earlier = median(row["throughput_tok_s"] for row in before)
            found.append(
                {
                    "cell_id": cell,
                    "times": len(before) + 1,
                    "change": last["throughput_tok_s"] / earlier - 1,
                    "same_source": len({row["source_digest"] for row in times.values()}) == 1,
                }
            )
    return sorted(found, key=lambda drift: -abs(drift["change"]))


def clocks(rows: Sequence[Row]) -> dict[str, str]:
    """Per sensor, in words, the lowest to the highest value over all cells; empty where none was read."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        for name, span in (row["clocks"] or {}).items():
            seen.setdefault(name, []).extend((span["min"], span["max"]))
    found = {}
    for name, values in seen.items():
        ends = " to ".join(dict.fromkeys(f"{end:,.0f}" for end in (min(values), max(values))))
        words, unit = SENSORS.get(name, (name, ""))
        found[words] = f"{ends} {unit}".strip()
    return found


def doubts(facts: dict[str, Any]) -> list[str]:
    """What keeps the rows from being one experiment: more than one commit, source or machine, or an edited checkout."""
    said = []
    for what, found in (
        ("commit", facts["commits"]),
        ("version of the measured source", facts["digests"]),
        ("device or host", [device["name"] for device in facts["devices"]]),
    ):
        if len(found) > 1:
            said.append(f"the rows come from more than one {what} ({', '.join(found)})")
    if any(commit.endswith("-dirty") for commit in facts["commits"]):
        said.append("the package had uncommitted changes")
    if any(len(versions) > 1 for versions in facts["versions"].values()):
        said.append("package versions differ between rows")
    return said
