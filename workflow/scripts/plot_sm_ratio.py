"""What the SMs granted to compression change: throughput and the slowest requests' time per token."""

from __future__ import annotations

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {"throughput_tok_s": ("tokens per second", 1.0), "tpot_p99": ("TPOT p99, ms", 1e3)}


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    rows = cells["row"]
    cells = cells.assign(sms=[_granted(row) for row in rows], asked=[_asked(row) for row in rows])
    shown = cells[cells["status"] == "ok"]
    split = shown[shown["sms"].notna() | shown["asked"].notna()]
    if split.empty:
        return plotting.nothing("no cell asked for a partition"), pd.DataFrame()
    by = "sms" if split["sms"].notna().any() else "asked"
    swept = _swept(split, by)
    fig, axes = plotting.grid(swept or [""], list(PANELS), height=3.0)
    for line, panel in zip(axes, swept or [None], strict=True):
        same = shown if panel is None else shown[shown["panel"] == panel]
        for ax, (column, (label, scale)) in zip(line, PANELS.items(), strict=True):
            _draw(ax, same[same["cell_id"].isin(split["cell_id"])], same, by, column, scale)
            ax.set_title(panel or "", wrap=True)
            ax.set_ylabel(label)
        line[0].legend(fontsize=6.5)
    kept = split[split["panel"].isin(swept)] if swept else split
    return fig, kept[["cell_id", "panel", "variant", "asked", "sms", "throughput_tok_s", "tpot_p99"]]


def _swept(split: pd.DataFrame, by: str) -> list[str]:
    """Requests that were measured with more than one share: cells of others differ in more than that."""
    shares = split.groupby("panel", sort=False)[by].nunique()
    return list(shares[shares > 1].index)


def _draw(ax: Axes, split: pd.DataFrame, shown: pd.DataFrame, by: str, column: str, scale: float) -> None:
    for i, (variant, part) in enumerate(split.dropna(subset=[by]).groupby("variant", sort=False)):
        means = part.groupby(by)[column].mean() * scale
        look = {"color": plotting.colour(variant), "marker": plotting.MARKERS[i], "ms": 7 - 3 * min(i, 1)}
        ax.plot(means.index, means, mfc="white" if i == 0 else None, label=variant, **look)
    for variant in ("baseline", "compression-only"):
        value = shown.loc[shown["variant"] == variant, column].astype(float).mean() * scale
        if pd.notna(value):
            ax.axhline(value, color=plotting.colour(variant), ls="--", lw=1, label=variant)
    ax.set_xlabel("SMs granted to compression" if by == "sms" else "share of SMs asked for (none granted)")
    plotting.from_zero(ax)


def _granted(row: dict) -> float | None:
    return (row["granted_sms"] or {}).get("compress")


def _asked(row: dict) -> float | None:
    return row["greenctx_compress_ratio"]


if __name__ == "__main__":
    plotting.run("sm_ratio", draw)
