"""What the SMs granted to compression change: throughput and the slowest requests' time per token."""

from __future__ import annotations

import pandas as pd
import plotting
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
    fig, axes = plotting.grid([""], list(PANELS), height=3.0)
    for ax, (column, (label, scale)) in zip(axes[0], PANELS.items(), strict=True):
        for variant, part in split.dropna(subset=[by]).groupby("variant", sort=False):
            means = part.groupby(by)[column].mean() * scale
            ax.plot(means.index, means, marker="o", ms=4, color=plotting.colour(variant), label=variant)
        for variant in ("baseline", "compression-only"):
            value = shown.loc[shown["variant"] == variant, column].astype(float).mean() * scale
            if pd.notna(value):
                ax.axhline(value, color=plotting.colour(variant), ls="--", lw=1, label=variant)
        ax.set_xlabel(
            "SMs granted to compression" if by == "sms" else "share of SMs asked for (none granted)"
        )
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=6.5)
    return fig, split[["cell_id", "panel", "variant", "asked", "sms", "throughput_tok_s", "tpot_p99"]]


def _granted(row: dict) -> float | None:
    return (row["granted_sms"] or {}).get("compress")


def _asked(row: dict) -> float | None:
    return row["greenctx_compress_ratio"]


if __name__ == "__main__":
    plotting.run("sm_ratio", draw)
