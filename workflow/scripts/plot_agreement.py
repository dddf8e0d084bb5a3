"""How much of the compressed output equals the uncompressed: a mark per cell, a bar at the median."""

from __future__ import annotations

import compact
import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from naming import BASELINE
from plotting import MARKERS, colour, dodge

MEASURES = {
    "token_match": "equal tokens at equal positions",
    "prefix_match": "tokens before the first difference",
}


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    compressed = cells[cells["setting"] != BASELINE]
    if all((row["weights"] or {}).get("kind") == "dummy" for row in cells["row"]):
        return plotting.nothing("random weights agree on nothing"), pd.DataFrame()
    columns = ["cell_id", "panel", "setting", "series", "batch_size", "status"]
    shown = _panels(compressed) if not compact.fits(compressed) else _lines(compressed)
    return shown, compressed[[*columns, *MEASURES]]


def _lines(compressed: pd.DataFrame) -> Figure:
    fig, axes, lines = compact.sheet(compressed, list(MEASURES.values()))
    for ax, name in zip(axes, MEASURES, strict=True):
        compact.spans(ax, lines, name, None)
        ax.set_xlim(-0.03, 1.03)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    return fig


def _panels(compressed: pd.DataFrame) -> Figure:
    panels, settings = plotting.order(compressed["panel"]), plotting.order(compressed["setting"])
    series = plotting.order(compressed["series"])
    fig, axes = plotting.grid(panels or [""], list(MEASURES), height=0.9 + 0.45 * len(settings))
    for i, panel in enumerate(panels):
        for j, (name, title) in enumerate(MEASURES.items()):
            _draw_marks(axes[i][j], compressed[compressed["panel"] == panel], settings, series, name)
            axes[i][j].set_title(f"{title}\n{panel}", wrap=True)
    plotting.legend(fig, series)
    return fig


def _draw_marks(ax: Axes, part: pd.DataFrame, settings: list[str], series: list[str], value: str) -> None:
    place = dodge(series, width=0.6)
    for y, setting in enumerate(settings):
        cells = part[part["setting"] == setting]
        known = cells[value].astype(float).dropna()
        if known.empty:
            ax.text(0.5, y, "no cell to compare", ha="center", va="center", fontsize=7, color="#a50e0e")
            continue
        for row in cells.itertuples():
            if not pd.isna(getattr(row, value)):
                shape = MARKERS[sorted(part["batch_size"].unique()).index(row.batch_size) % len(MARKERS)]
                ax.scatter(
                    getattr(row, value),
                    y + place[row.series],
                    s=20,
                    color=colour(row.series),
                    marker=shape,
                    edgecolors="white",
                    linewidths=0.4,
                    zorder=3,
                )
        ax.vlines(known.median(), y - 0.38, y + 0.38, color="#202124", linewidth=1.6)
    ax.set_yticks(range(len(settings)), settings)
    ax.set_ylim(len(settings) - 0.5, -0.5)
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.grid(axis="y", visible=False)


if __name__ == "__main__":
    plotting.run("agreement", draw)
