"""Throughput by variant and batch size: bars for the median repeat, whiskers for the slowest and fastest."""

from __future__ import annotations

from typing import Any

import compact
import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from naming import BASELINE
from plotting import colour, dodge


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """A row per panel, a column per method; the baseline stands in each column it is compared with. A line per cell
    where panels would not do."""
    columns = ["cell_id", "panel", "setting", "series", "batch_size", "status"]
    points = cells[[*columns, "throughput_tok_s", "throughput_min", "throughput_max"]]
    return _panels(cells) if not compact.fits(cells) else _lines(cells), points


def _lines(cells: pd.DataFrame) -> Figure:
    beside = _beside(cells)
    title = "tokens / s, and times the baseline's"
    fig, (ax,), lines = compact.sheet(cells, [title + (", or compression-only's" if beside else "")])
    compact.bars(ax, lines, "throughput_tok_s", more=lambda cell: _ratio(cell, beside), end="throughput_max")
    for y, row in lines:
        if not pd.isna(row.throughput_tok_s):
            ax.hlines(y, row.throughput_min, row.throughput_max, color="#202124", linewidth=1)
    return fig


def _beside(cells: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Throughput of compression-only, by the baseline's id and the setting, where that baseline has no row."""
    known = {row["cell_id"] for row in cells["row"] if row["status"] == "ok"}
    return {
        (cell.row["baseline_id"], cell.setting): cell.throughput_tok_s
        for cell in cells.itertuples()
        if cell.variant == "compression-only"
        and cell.row["baseline_id"] not in known
        and not pd.isna(cell.throughput_tok_s)
    }


def _ratio(cell: Any, beside: dict[tuple[str, str], float]) -> str:
    value, theirs = cell.row["speedup_vs_baseline"], beside.get((cell.row["baseline_id"], cell.setting))
    if value is None and theirs and cell.variant != "compression-only":
        value = cell.throughput_tok_s / theirs
    return "" if value is None or cell.setting == BASELINE else f"   {value:.2f}\N{MULTIPLICATION SIGN}"


def _panels(cells: pd.DataFrame) -> Figure:
    panels = plotting.order(cells["panel"])
    settings = [s for s in plotting.order(cells["setting"]) if s != BASELINE] or [BASELINE]
    series = plotting.order(cells["series"])
    fig, axes = plotting.grid(panels, settings)
    for i, panel in enumerate(panels):
        for j, setting in enumerate(settings):
            part = cells[(cells["panel"] == panel) & cells["setting"].isin([setting, BASELINE])]
            _draw_bars(axes[i][j], part, series)
            axes[i][j].set_title(f"{setting}\n{panel}", wrap=True)
            axes[i][j].set_ylabel("tokens / s" if j == 0 else "")
        top = max(ax.get_ylim()[1] for ax in axes[i])
        for ax in axes[i]:
            ax.set_ylim(0, top)
    plotting.legend(fig, series)
    return fig


def _draw_bars(ax: Axes, part: pd.DataFrame, series: list[str]) -> None:
    place = dodge(series)
    groups = sorted(part["batch_size"].unique())
    for row in part.itertuples():
        x = groups.index(row.batch_size) + place[row.series]
        if pd.isna(row.throughput_tok_s):
            plotting.mark_missing(ax, x, row.status)
            continue
        ax.bar(x, row.throughput_tok_s, width=place[""] * 0.9, color=colour(row.series))
        ax.vlines(x, row.throughput_min, row.throughput_max, color="#202124", linewidth=1)
    plotting.label_batches(ax, groups)


if __name__ == "__main__":
    plotting.run("throughput", draw)
