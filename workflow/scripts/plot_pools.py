"""The same requests over KV pools of several sizes: throughput, and where compression pays."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from naming import BASELINE, requests, setting

LEAST = 3  # sizes that make a line worth drawing
GIB = 1024**3


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """A row per requests that were sent to at least `LEAST` pools: throughput with the sequences that ran at once,
    and its ratio to the baseline's in the same pool."""
    sized = (row for row in cells["row"] if row["status"] == "ok" and row["num_pages"])
    points = [_point(row) for row in sized if row["kv_bytes_per_token"]]  # rows of old do not say it
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault(point["group"], []).append(point)
    shown = [g for g in groups.values() if len({point["asked"] for point in g}) >= LEAST]
    if not shown:
        return plotting.nothing("no requests were sent to several pools"), pd.DataFrame()
    fig, axes = plotting.grid([""] * len(shown), ["throughput", "ratio"], height=3.2)
    for (left, right), group in zip(axes, shown, strict=True):
        _draw(left, right, pd.DataFrame(group))
    return fig, pd.DataFrame([point for group in shown for point in group]).drop(columns=["group"])


def _point(row: dict[str, Any]) -> dict[str, Any]:
    told = ["kv_dtype", "enable_prefix_caching", "policy", "immediate_release"]
    return {
        "group": (f"{requests(row, False, told)}, batch {row['batch_size']}", row["page_size"]),
        "cell_id": row["cell_id"],
        "asked": row["cell"].get("num_pages") or "all",
        "series": row["variant"] if row["method"] is None else f"{row['variant']} {setting(row)}",
        "num_pages": row["num_pages"],
        "pool_gib": row["num_pages"] * row["page_size"] * row["kv_bytes_per_token"] / GIB,
        "throughput_tok_s": row["throughput_tok_s"],
        "speedup_vs_baseline": row["speedup_vs_baseline"],
        "peak_running": row["peak_running"],
    }


def _draw(left: Axes, right: Axes, points: pd.DataFrame) -> None:
    for series, part in points.sort_values("pool_gib").groupby("series", sort=False):
        look = {"color": plotting.colour(series), "marker": "o", "ms": 4, "label": series}
        left.plot(part["pool_gib"], part["throughput_tok_s"], **look)
        for at in part.itertuples():
            left.annotate(
                f"{at.peak_running}",
                (at.pool_gib, at.throughput_tok_s),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                size=7,
            )
        if not series.startswith(BASELINE):
            right.plot(part["pool_gib"], part["speedup_vs_baseline"].astype(float), **look)
            for at in part.itertuples():
                place = (at.pool_gib, at.speedup_vs_baseline)
                right.annotate(
                    f"{at.speedup_vs_baseline:.2f}",
                    place,
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    size=7,
                )
    right.axhline(1.0, color=plotting.VARIANT_COLOURS[BASELINE], ls="--", lw=1)
    right.margins(y=0.2)
    left.set_title(points["group"].iloc[0][0], wrap=True)
    left.set_ylabel("tokens / s")
    right.set_title("times the baseline's throughput\nin the same pool")
    for ax in (left, right):
        ax.set_xlabel("KV pool, GiB")
        ax.set_xlim(left=0)
    left.set_ylim(0, left.get_ylim()[1] * 1.08)
    left.legend(fontsize=7, loc="lower right")


if __name__ == "__main__":
    plotting.run("pools", draw)
