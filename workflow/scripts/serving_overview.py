"""The tables of the serving page: a line per engine, and engines side by side at one rate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from serving_rows import engines, measured, sustained_rate

Row = dict[str, Any]


def label(row: Row) -> str:
    return row["setting"] if row["immediate_release"] else f"{row['setting']}, pages held"


def overview(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line per engine: what it sustains, and its best throughput and goodput over the rates."""
    lines = []
    for model, policy, setting, release in engines(rows):
        own = measured(rows, model=model, policy=policy, setting=setting, immediate_release=release)
        lines.append(
            {
                "model": model,
                "policy": policy,
                "setting": label({"setting": setting, "immediate_release": release}),
                "rates": ", ".join(f"{row['rate']:g}" for row in own),
                "sustained": sustained_rate(own),
                "output_tok_s": max((row["output_tok_s"] for row in own), default=None),
                "goodput": max((row["goodput_requests_s"] for row in own), default=None),
                "ttft": own[-1]["ttft_s"] if own else None,
                "tpot": own[-1]["tpot_s"] if own else None,
                "peak_kv_bytes": max((row["peak_kv_bytes"] for row in own), default=None),
            }
        )
    return lines


def side_by_side(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per model, the rows of the rate that most of its engines were measured at (the highest of several): only at one
    rate can methods and policies be compared. Left out for a model without two engines at any rate."""
    tables = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = measured(rows, model=model)
        counts = Counter(row["rate"] for row in own)
        rate = max(counts, key=lambda rate: (counts[rate], rate), default=None)
        if rate is not None and counts[rate] > 1:
            same = [{"label": label(row), **row} for row in own if row["rate"] == rate]
            tables.append({"model": model, "rate": rate, "rows": same})
    return tables
