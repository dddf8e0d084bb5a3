"""What compression does to the cache: entries before and after, and the most bytes held at once."""

from __future__ import annotations

import compact
import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from naming import BASELINE
from plotting import VARIANT_COLOURS

MIB = 1024 * 1024


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    columns = ["cell_id", "panel", "setting", "series", "batch_size", "status"]
    points = cells[[*columns, "kv_len_before", "kv_len_after", "peak_kv_bytes"]]
    return _panels(cells) if not compact.fits(cells) else _lines(cells), points


def _lines(cells: pd.DataFrame) -> Figure:
    titles = ["KV entries per request, before and after", "most KV memory in use, MiB"]
    fig, axes, lines = compact.sheet(cells, titles)
    for y, row in lines:
        if not pd.isna(row.kv_len_before):
            axes[0].barh(y, row.kv_len_before, height=0.8, color=VARIANT_COLOURS[BASELINE], alpha=0.35)
    compressed = [(y, row) for y, row in lines if row.setting != BASELINE]
    kept, words = "kv_len_after", "nothing was compressed"
    compact.bars(axes[0], compressed, kept, more=lambda row: f" of {row.kv_len_before:,.0f}", absent=words)
    compact.bars(axes[1], lines, "peak_kv_bytes", 1 / MIB)
    return fig


def _panels(cells: pd.DataFrame) -> Figure:
    panels, settings = plotting.order(cells["panel"]), plotting.order(cells["setting"])
    series = plotting.order(cells["series"])
    fig, axes = plotting.grid(panels, ["entries", "bytes"])
    for i, panel in enumerate(panels):
        part = cells[cells["panel"] == panel].assign(
            mib=lambda rows: rows["peak_kv_bytes"].astype(float) / MIB
        )
        _draw_entries(axes[i][0], part, [s for s in settings if s != BASELINE])
        axes[i][0].set_title(f"KV entries per request, before and after\n{panel}", wrap=True)
        plotting.draw_points(axes[i][1], part, series, settings, "mib", None)
        axes[i][1].set_title(f"most KV memory in use\n{panel}", wrap=True)
        axes[i][1].set_ylabel("MiB")
        plotting.from_zero(axes[i][1])
    plotting.legend(fig, series, settings)
    return fig


def _draw_entries(ax: Axes, part: pd.DataFrame, settings: list[str]) -> None:
    """The mean over a method's cells: every variant of it keeps the same share."""
    for x, setting in enumerate(settings):
        cells = part[part["setting"] == setting]
        before, after = (
            cells["kv_len_before"].astype(float).mean(),
            cells["kv_len_after"].astype(float).mean(),
        )
        if pd.isna(before):
            ok = (cells["status"] == "ok").any()
            plotting.mark_missing(ax, x, "nothing was compressed" if ok else "no cell succeeded")
            continue
        ax.bar(x - 0.2, before, width=0.38, color=VARIANT_COLOURS[BASELINE])
        ax.bar(x + 0.2, after, width=0.38, color=VARIANT_COLOURS["compression-only"])
        for side, value in ((-0.2, before), (0.2, after)):
            ax.text(x + side, value, f"{value:.0f}", ha="center", va="bottom", fontsize=7.5)
    slanted = {"rotation": 30, "ha": "right"} if len(settings) > 3 else {}
    ax.set_xticks(range(len(settings)), settings, **slanted)
    ax.set_xlim(-0.6, max(1, len(settings)) - 0.4)
    ax.margins(y=0.15)
    ax.set_ylabel("KV entries")
    ax.grid(axis="x", visible=False)


if __name__ == "__main__":
    plotting.run("kv_memory", draw)
