"""What the rows say, as numbers and sentences. Pure functions of the table: nothing in the report is typed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from naming import differing, one_model, requests, series, setting

from fastcache.config import VARIANTS

MOST_LINES = 24  # of the table of comparisons
TIMES = "\N{MULTIPLICATION SIGN}"
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One measured cell beside the baseline of the same model, requests and batch size."""

    row: Row
    baseline: Row
    control: float = 0.0  # how far apart cells are that did the same work as `row`, relative to their median

    @property
    def speedup(self) -> float:
        return self.row["speedup_vs_baseline"]

    @property
    def disturbed(self) -> bool:
        """One of the two was measured while something else kept the CPU busy: they cannot be compared."""
        return bool(self.row.get("host_busy") or self.baseline.get("host_busy"))

    @property
    def noise(self) -> float | None:
        """Largest of the two relative spreads and the control; None when a single repeat cannot show any."""
        both = (self.row["repeats"], self.baseline["repeats"])
        if any(len(r["values"]) < 2 for r in both):
            return None
        return max(self.control, *(r["spread"] for r in both))

    @property
    def verdict(self) -> str:
        """faster or slower by more than the noise, same within it, undecided where there is no measure of it."""
        if self.noise is None:
            return "undecided"
        if abs(self.speedup - 1) <= self.noise:
            return "same"
        return "faster" if self.speedup > 1 else "slower"

    def ratio(self, name: str) -> float | None:
        """This cell's median `ttft_s` or `tpot_s` over the baseline's; above 1 is slower."""
        ours, theirs = self.row[name], self.baseline[name]
        return ours["p50"] / theirs["p50"] if ours and theirs and theirs["p50"] else None


def pairs_of(rows: Sequence[Row]) -> list[Comparison]:
    """Every pair in which both sides have numbers."""
    by_id = {row["cell_id"]: row for row in rows}
    same_work: dict[Any, list[float]] = {}
    for row in rows:
        if row["throughput_tok_s"] is not None:
            same_work.setdefault(_work(row), []).append(row["throughput_tok_s"])
    control = {key: (max(them) - min(them)) / median(them) for key, them in same_work.items()}
    return [
        Comparison(row, by_id[row["baseline_id"]], control[_work(row)])
        for row in rows
        if row["speedup_vs_baseline"] is not None and row["cell_id"] != row["baseline_id"]
    ]


def _work(row: Row) -> tuple[Any, ...]:
    """What a cell computed: variants without a partition and without decisions of their own differ in name only."""
    alone = row["greenctx_available"] or row["policy"] == "auto"
    options = (row["method"], row["compression_factor"], str(row["cell"].get("method_params")))
    return (row["baseline_id"], *options, row["cell_id"] if alone else None)


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """The pairs that can be compared: both sides have numbers, and the machine was theirs."""
    return [pair for pair in pairs_of(rows) if not pair.disturbed]


def compressing(pairs: Sequence[Comparison]) -> list[Comparison]:
    """Those that say what compression is worth: a cell that compressed no request says nothing of it."""
    return [pair for pair in pairs if pair.row.get("compressed_requests") != 0]


def left_out(rows: Sequence[Row]) -> str:
    """How many pairs a busy machine spoilt, in a sentence; empty if none."""
    pairs = pairs_of(rows)
    spoilt = sum(pair.disturbed for pair in pairs)
    if not spoilt:
        return ""
    return (
        f" {spoilt} of {count(len(pairs), 'comparison')} are left out, because another process kept the CPU busy "
        "while one side was measured: close other programs and measure those cells again."
    )


def middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def kept_share(row: Row) -> float | None:
    """Share of the KV entries that compression kept."""
    return row["kv_len_after"] / row["kv_len_before"] if row["kv_len_before"] else None


def token_match(row: Row) -> float | None:
    return row["agreement"]["token_match"] if row["agreement"] else None


def group_summary(pairs: Sequence[Comparison]) -> dict[str, Any]:
    """The medians of one group of comparisons, and how many there were."""
    speedups = [pair.speedup for pair in pairs]
    return {
        "pairs": len(pairs),
        "speedup": middle(speedups),
        "slowest": min(speedups, default=None),
        "fastest": max(speedups, default=None),
        "ttft": middle(pair.ratio("ttft_s") for pair in pairs),
        "tpot": middle(pair.ratio("tpot_s") for pair in pairs),
        "kept": middle(kept_share(pair.row) for pair in pairs),
        "agreement": middle(token_match(pair.row) for pair in pairs),
        "verdicts": Counter(pair.verdict for pair in pairs),
    }


def tiles(pairs: Sequence[Comparison]) -> list[tuple[str, str]]:
    """(number, what it is) of what the page shows first."""
    of = group_summary(pairs)
    return [
        (times(of["speedup"]), f"median throughput against the baseline, {count(of['pairs'], 'comparison')}"),
        (times(of["fastest"]), "best cell"),
        (percent(of["kept"]), "of the KV entries kept, median"),
        (percent(of["agreement"]), "of output tokens equal to the uncompressed ones, median"),
    ]


def grouped(pairs: Sequence[Comparison], key: Callable[[Row], Any]) -> dict[Any, dict[str, Any]]:
    groups: dict[Any, list[Comparison]] = {}
    for pair in pairs:
        groups.setdefault(key(pair.row), []).append(pair)
    return {name: group_summary(members) for name, members in groups.items()}


def by_variant(rows: Sequence[Row], planned: Mapping[str, Row] | None = None) -> list[dict[str, Any]]:
    """A line per variant, the baseline first; speed-ups over pairs in which both sides are ok. planned: each cell that
    there should be a row of, by its id; without it, those that there are."""
    pairs = comparisons(rows)
    wanted = {row["cell_id"]: row for row in rows} | dict(planned or {})
    lines = []
    for name in sorted({row["variant"] for row in rows}, key=VARIANTS.index):
        members = [row for row in rows if row["variant"] == name]
        lines.append(
            group_summary([pair for pair in pairs if pair.row["variant"] == name])
            | {
                "variant": name,
                "cells": sum(cell["variant"] == name for cell in wanted.values()),
                "ok": sum(row["status"] == "ok" for row in members),
                "throughput": middle(row["throughput_tok_s"] for row in members),
            }
        )
    return lines


def by_requests(rows: Sequence[Row], pairs: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A line per comparison, what it costs in memory and wins in speed; none where they would be too many to read."""
    if len(pairs) > MOST_LINES:
        return []
    alone, said = one_model(rows), differing(rows)
    held = [
        side["peak_kv_bytes"] for pair in pairs for side in (pair.baseline, pair.row) if side["peak_kv_bytes"]
    ]
    digits = 0 if min(held, default=2**30) >= 10 * 2**20 else 2  # no cache is shown as 0 MiB
    return [
        {
            "requests": requests(pair.row, alone, said),
            "batch": pair.row["batch_size"],
            "variant": series(pair.row),
            "setting": setting(pair.row),
            "throughput": [side["throughput_tok_s"] for side in (pair.baseline, pair.row)],
            "speedup": pair.speedup,
            "verdict": pair.verdict,
            "running": [side["peak_running"] for side in (pair.baseline, pair.row)],
            "kv_mib": [
                side["peak_kv_bytes"] and side["peak_kv_bytes"] / 2**20 for side in (pair.baseline, pair.row)
            ],
            "kv_digits": digits,
        }
        for pair in pairs
    ]


def headline(rows: Sequence[Row]) -> str:
    """Does it pay, by how much, and at what agreement: one or two sentences."""
    pairs = compressing(comparisons(rows))
    if not pairs:
        return (
            "No compressed cell can be compared with its baseline, so there is nothing to conclude from this run."
            + left_out(rows)
        )
    all_of = group_summary(pairs)
    best = max(pairs, key=lambda pair: pair.speedup)
    span = f"the median throughput is {times(all_of['speedup'])} the baseline's over {count(len(pairs), 'comparison')}"
    top = f"at best {times(best.speedup)} ({describe(best.row, rows)})"
    return f"{_answer(all_of['verdicts'], all_of['speedup'])}: {span}, {top}. {_price(rows, all_of)}{left_out(rows)}"


def _answer(verdicts: Counter[str], speedup: float) -> str:
    if verdicts["undecided"] == sum(verdicts.values()):
        return "With a single repeat per cell, speed cannot be told from noise"
    if verdicts["faster"] > verdicts["slower"] and speedup > 1:
        return "Compression pays in speed here"
    if verdicts["slower"] > verdicts["faster"] and speedup < 1:
        return "Compression does not pay in speed here"
    return "Compression makes no consistent difference in speed here"


def _price(rows: Sequence[Row], all_of: dict[str, Any]) -> str:
    kept = f"It keeps {percent(all_of['kept'])} of the KV entries" if all_of["kept"] is not None else ""
    if all_of["agreement"] is None:
        return f"{kept}." if kept else ""
    said = f"{percent(all_of['agreement'])} of the output tokens equal the uncompressed ones"
    if dummy(rows):
        said += ", which says nothing about quality, since the weights are random"
    return f"{kept}, and {said}." if kept else f"Of its output, {said}."


def dummy(rows: Sequence[Row]) -> bool:
    return any(
        (row["weights"] or {}).get("kind") == "dummy" or row["cell"].get("load_format") == "dummy"
        for row in rows
    )


def describe(row: Row, among: Iterable[Row]) -> str:
    """What was asked of which engine, and of which model if there are several in the rows that it is one of."""
    how = f" with {row['method']} {TIMES}{row['compression_factor']:g}" if row["method"] else ""
    return f"{row['variant']}{how}, {requests(row, one_model(among), ())}, batch {row['batch_size']}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}{TIMES}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
