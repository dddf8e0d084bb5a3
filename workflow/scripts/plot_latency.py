"""Time to first token and per output token: a mark at the median request, a line to the 99th percentile."""

from __future__ import annotations

import compact
import pandas as pd
import plotting
from matplotlib.figure import Figure

MEASURES = {"ttft": ("time to first token", "s", 1.0), "tpot": ("time per output token", "ms", 1000.0)}


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    columns = ["cell_id", "panel", "setting", "series", "batch_size", "status"]
    points = cells[[*columns, "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99"]]
    points = points.rename(columns=lambda c: f"{c}_s" if c.startswith(("ttft", "tpot")) else c)
    return _panels(cells) if not compact.fits(cells) else _lines(cells), points


def _lines(cells: pd.DataFrame) -> Figure:
    fig, axes, lines = compact.sheet(cells, [f"{title}, {unit}" for title, unit, _ in MEASURES.values()])
    for ax, (name, (_, _, scale)) in zip(axes, MEASURES.items(), strict=True):
        compact.spans(ax, lines, f"{name}_p50", f"{name}_p99", scale)
        ax.set_xlim(left=0)
    return fig


def _panels(cells: pd.DataFrame) -> Figure:
    panels, settings = plotting.order(cells["panel"]), plotting.order(cells["setting"])
    series = plotting.order(cells["series"])
    fig, axes = plotting.grid(panels, list(MEASURES))
    for i, panel in enumerate(panels):
        for j, (name, (title, unit, scale)) in enumerate(MEASURES.items()):
            part = cells[cells["panel"] == panel].assign(
                low=lambda rows, n=name, k=scale: rows[f"{n}_p50"].astype(float) * k,
                high=lambda rows, n=name, k=scale: rows[f"{n}_p99"].astype(float) * k,
            )
            plotting.draw_points(axes[i][j], part, series, settings, "low", "high")
            axes[i][j].set_title(f"{title}\n{panel}", wrap=True)
            axes[i][j].set_ylabel(unit)
            plotting.from_zero(axes[i][j])
    plotting.legend(fig, series, settings)
    return fig


if __name__ == "__main__":
    plotting.run("latency", draw)
