"""Triad beside the best that could have been chosen for the same requests without deciding anything. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from findings import Row, count, describe, middle, times
from naming import differing, one_model, requests, setting

# How rows begin the name of a decision to run prefill on one side of an SM split, beside decode steps.
SIDE_BY_SIDE = "side by side, "


@dataclass(frozen=True)
class Against:
    """A row of triad, and the fastest row of the same requests, method and factor (or the baseline) that decides
    nothing."""

    row: Row
    best: Row

    @property
    def ratio(self) -> float:
        return self.row["throughput_tok_s"] / self.best["throughput_tok_s"]

    @property
    def bound(self) -> bool:
        """The config's split binds: compression stays on it, and whether that pays is not triad's to decide."""
        return bool(self.row["greenctx_available"]) and not self.row["cell"].get("greenctx_bound")

    @property
    def noise(self) -> float | None:
        """The larger spread of the two cells' repeats; None where one of them ran once."""
        both = (self.row["repeats"], self.best["repeats"])
        return None if any(len(r["values"]) < 2 for r in both) else max(r["spread"] for r in both)


def against_fixed(rows: Sequence[Row]) -> list[Against]:
    """One for each row of triad that decided and can be compared, those that decided freely first."""
    usable = [row for row in rows if row["status"] == "ok" and not row.get("host_busy")]
    found = []
    for row in usable:
        if row["variant"] != "triad" or row["policy"] != "auto":
            continue
        ours = (row["method"], row["compression_factor"])
        fixed = [
            other
            for other in usable
            if other["baseline_id"] == row["baseline_id"]
            and other["policy"] != "auto"
            and (other["method"], other["compression_factor"]) in (ours, (None, None))
        ]
        if fixed:
            found.append(Against(row, max(fixed, key=lambda other: other["throughput_tok_s"])))
    return sorted(found, key=lambda each: each.bound)


def _apart(found: Sequence[Against]) -> tuple[list[Against], list[Against]]:
    """Those that decided freely, and those that a split bound."""
    return [each for each in found if not each.bound], [each for each in found if each.bound]


def sentence(found: Sequence[Against]) -> str:
    """How triad stands beside the best variant that decides nothing, where it is free and where a split binds it."""
    free, bound = _apart(found)
    said = []
    if free:
        least = min(free, key=lambda each: each.ratio)
        said.append(
            f"Beside the fastest variant that decides nothing, triad has {_range(free)}; least on "
            f"{describe(least.row, [each.row for each in found])}, where {least.best['variant']} is fastest."
        )
    if bound:
        who, beside = ("it", "") if free else ("triad", ", beside the fastest variant that decides nothing")
        said.append(f"Bound to a split of the SMs, {who} has {_range(bound)}{beside}.")
    return " ".join(said)


def _range(found: Sequence[Against]) -> str:
    low, high = (times(pick(each.ratio for each in found)) for pick in (min, max))
    return f"{low} to {high} its throughput, over {count(len(found), 'set')} of the same requests"


def tiles(found: Sequence[Against]) -> list[tuple[str, str]]:
    """(number, what it is) of what the page shows first where no compressed cell has a baseline."""
    free, bound = ([each.ratio for each in part] for part in _apart(found))
    said = []
    if free:
        words = "median throughput of triad against the fastest variant that decides nothing"
        said = [
            (times(middle(free)), f"{words}, {count(len(free), 'set')} of requests"),
            (times(min(free)), "least of them"),
            (times(max(free)), "most of them"),
        ]
    if bound:
        said.append((times(max(bound)), "most where the config binds triad to a split of the SMs"))
    return said


def table(rows: Sequence[Row], found: Sequence[Against]) -> list[dict[str, Any]]:
    """A line for each: the requests, both throughputs, and what was decided."""
    alone, said = one_model(rows), differing(rows)
    return [
        {
            "requests": requests(each.row, alone, said),
            "batch": each.row["batch_size"],
            "setting": setting(each.row),
            "best": each.best["variant"],
            "throughput": [side["throughput_tok_s"] for side in (each.best, each.row)],
            "ratio": each.ratio,
            "noise": each.noise,
            "split": _split(each),
            "decided": _decided(each.row),
        }
        for each in found
    ]


def _split(each: Against) -> str:
    if not each.row["greenctx_available"]:
        return "none"
    granted = each.row["granted_sms"] or {}
    sms = f"{granted.get('main')} + {granted.get('compress')} SMs"
    return f"bound to {sms}" if each.bound else f"at most {granted.get('compress')} SMs"


def _decided(row: Row) -> str:
    """How many requests it compressed, where, and in how many of its steps prompts and tokens went together."""
    done, whole = row["compressed_requests"] or 0, row["uncompressed_requests"] or 0
    words = [f"{done} of {done + whole} compressed"]
    kept = (row["decisions"] or {}).get("decisions", [])
    places = Counter({d["choice"]: d["count"] for d in kept if d["about"] == "place"})
    if done and places:
        place, _, sms = places.most_common(1)[0][0].partition(":")
        words.append(f"{place} on {sms} SMs" if sms else place)
    mixed = (row["steps"] or {}).get("mixed")
    beside = Counter({d["choice"]: d["count"] for d in kept if d["choice"].startswith(SIDE_BY_SIDE)})
    if mixed:
        words.append(f"{mixed:,} of {sum(row['steps'].values()):,} steps mixed")
    if beside:
        split = beside.most_common(1)[0][0].removeprefix(SIDE_BY_SIDE)
        words.append(f"{beside.total():,} prefills beside decode steps, mostly on {split} SMs")
    return ", ".join(words if mixed or beside else [*words, "prompts first"])
