"""Which serving rows belong together: of an engine, of a workload, up to the highest sustained rate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def measured(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Ok rows with these fields, lowest rate first."""
    found = [r for r in rows if r["status"] == "ok" and all(r[k] == v for k, v in wanted.items())]
    return sorted(found, key=lambda row: row["rate"])


def engines(rows: Sequence[Row]) -> list[tuple[str, str, str, bool]]:
    """(model, policy, setting, immediate release), in order of appearance."""
    return list(dict.fromkeys((r["model"], r["policy"], r["setting"], r["immediate_release"]) for r in rows))


def sustained_rate(rows: Sequence[Row]) -> float | None:
    """The highest measured rate whose p99 TTFT is within the limit, and all lower ones too."""
    last, _ = sustained_edge(rows)
    return last["rate"] if last else None


def sustained_edge(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """The row of the highest sustained rate, and the first one above it."""
    last = None
    for row in sorted(rows, key=lambda row: row["rate"]):
        if not row["sustained"]:
            return last, row
        last = row
    return last, None


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the lengths in the name of a model that served several workloads: only rows of the same requests
    can be compared."""
    asked: dict[str, set[str]] = {}
    for row in rows:
        asked.setdefault(row["model"], set()).add(json.dumps(row["cell"]["workload"], sort_keys=True))
    several = {model for model, workloads in asked.items() if len(workloads) > 1}
    return [row | {"model": _with_lengths(row)} if row["model"] in several else row for row in rows]


def _with_lengths(row: Row) -> str:
    workload = row["cell"]["workload"]
    lengths = " + ".join(
        f"{workload[part]['low']}-{workload[part]['high']}" for part in ("context", "output")
    )
    arrivals = "" if workload["arrivals"] == "poisson" else f", {workload['arrivals']} arrivals"
    return f"{row['model']} ({lengths} tokens{arrivals})"
