"""Rows side by side: speed-ups and agreement against each row's own baseline, and a table to read. Pure.

Every comparison needs two rows with status ok; where one is missing the field stays None, never 1 or 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def enrich(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Copies of the rows with `speedup_vs_baseline` and `agreement` filled in from their baselines."""
    rows = [dict(row) for row in rows]
    baselines = {
        row["cell_id"]: row for row in rows if row["variant"] == "baseline" and row["status"] == "ok"
    }
    for row in rows:
        base = baselines.get(row["baseline_id"]) if row["status"] == "ok" else None
        row["speedup_vs_baseline"] = base and row["throughput_tok_s"] / base["throughput_tok_s"]
        row["agreement"] = base and agreement(row["output_sample"], base["output_sample"])
    return rows


def agreement(sample: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """How far two samples of token ids say the same, request by request; None if they share no token.

    After a first difference the two texts are different stories, so `prefix_match` is the stricter number
    and `token_match` the kinder one.
    """
    pairs = [(a[: len(b)], b[: len(a)]) for a, b in zip(sample, reference, strict=False)]
    pairs = [(a, b) for a, b in pairs if a]
    if not pairs:
        return None
    equal = [sum(x == y for x, y in zip(a, b, strict=True)) for a, b in pairs]
    first = [first_difference(a, b) for a, b in pairs]
    tokens = sum(len(a) for a, _ in pairs)
    return {
        "requests": len(pairs),
        "token_match": sum(equal) / tokens,
        "prefix_match": sum(first) / tokens,
        "median_first_difference": statistics.median(first),
    }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Position of the first different token; the common length if there is none."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


COLUMNS = (
    "model",
    "workload",
    "batch",
    "variant",
    "method",
    "status",
    "tok/s",
    "speed-up",
    "TTFT p50",
    "TPOT p50",
    "KV kept",
    "agree",
)
NUMBERS = ("batch", "tok/s", "speed-up", "TTFT p50", "TPOT p50", "KV kept", "agree")


def format_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A compact plain-text table of enriched rows; what was not measured is a dash."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in NUMBERS else text.ljust(width)
            for column, text, width in zip(COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def requests_of(row: Mapping[str, Any]) -> str:
    """The workload as a reader says it: its name, and how many pictures go with each request if any do."""
    images = row["cell"]["workload"].get("images", 0)
    return row["workload"] + (f" with {images} image{'s' * (images > 1)}" if images else "")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    kept = row["kv_len_after"] / row["kv_len_before"] if row["kv_len_before"] else None
    return (
        row["model"],
        requests_of(row),
        str(row["batch_size"]),
        row["variant"],
        "-" if row["method"] is None else f"{row['method']} {row['compression_factor']:g}x",
        row["status"],
        _number(row["throughput_tok_s"], ",.0f"),
        _number(row["speedup_vs_baseline"], ".2f", "x"),
        _seconds(row["ttft_s"]),
        _seconds(row["tpot_s"]),
        _number(kept, ".0%"),
        _number(row["agreement"] and row["agreement"]["token_match"], ".0%"),
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _seconds(percentiles: Mapping[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    value = percentiles["p50"]
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
