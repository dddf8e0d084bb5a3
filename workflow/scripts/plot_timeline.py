"""KV pages in use over one repeat, by the stage of the sequences that own them, for each variant and policy."""

from __future__ import annotations

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the bottom up; the colours are those of Okabe and Ito.
STAGES = {"whole": "#5f6368", "compressed": "#0072B2", "before": "#E69F00", "held": "#CC79A7"}
WORDS = {
    "whole": "decoding, full cache",
    "compressed": "decoding, compressed",
    "before": "before compression",
    "held": "held after compression",
}
MOST = 8


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    shown = [row for row in plotting.largest(cells) if row.get("kv_timeline")][:MOST]
    if not shown:
        return plotting.nothing("no cell has samples of its KV pages"), pd.DataFrame()
    fig, axes = plotting.grid([""] * -(-len(shown) // 2), ["left", "right"])
    points = []
    for ax, row in zip(axes.flat, shown, strict=False):
        points += _draw(ax, row)
        ax.set_title(plotting.title(plotting.name_of(row), cells, row))
    used = axes.flat[: len(shown)]
    for ax in used:  # one scale, so that panels can be compared
        ax.set_xlim(0, max(each.get_xlim()[1] for each in used))
        ax.set_ylim(0, max(each.get_ylim()[1] for each in used))
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    handles = [plotting.plt.Rectangle((0, 0), 1, 1, color=c, label=WORDS[s]) for s, c in STAGES.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=4)
    return fig, pd.DataFrame(points)


def _draw(ax: Axes, row: dict) -> list[dict]:
    line, name = row["kv_timeline"], plotting.name_of(row)
    ax.stackplot(line["time_s"], *(line[s] for s in STAGES), colors=STAGES.values(), step="post", lw=0)
    ax.set_xlabel("seconds")
    ax.set_ylabel("KV pages")
    columns = {"cell_id": row["cell_id"], "series": name}
    return [columns | {k: v[i] for k, v in line.items()} for i in range(len(line["time_s"]))]


if __name__ == "__main__":
    plotting.run("timeline", draw)
