"""One repeat over time, for each variant and policy: what ran on the device, and KV pages by the stage of the sequences
that own them."""

from __future__ import annotations

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the bottom up; the colours are those of Okabe and Ito.
PAGES = {"whole": "#5f6368", "compressed": "#0072B2", "before": "#E69F00", "held": "#CC79A7"}
WORDS = {
    "whole": "decoding, full cache",
    "compressed": "decoding, compressed",
    "before": "before compression",
    "held": "held after compression",
}
LANES = {"compress": "#CC79A7", "decode": "#0072B2", "mixed": "#009E73", "prefill": "#E69F00"}
LANE_HEIGHT = 0.11  # of the panel's
MOST = 8


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    shown = [row for row in plotting.largest(cells) if row.get("kv_timeline")][:MOST]
    if not shown:
        return plotting.nothing("no cell has samples of its KV pages"), pd.DataFrame()
    fig, axes = plotting.grid([""] * -(-len(shown) // 2), ["left", "right"], height=3.2)
    points = []
    used = list(axes.flat[: len(shown)])
    for ax, row in zip(used, shown, strict=True):
        points += _draw(ax, row)
    last = max(ax.get_xlim()[1] for ax in used)
    for ax, row in zip(used, shown, strict=True):  # one scale, so that panels can be compared
        ax.set_xlim(0, last)
        ax.set_ylim(0, max(each.get_ylim()[1] for each in used))
        lanes = _lanes(ax, row, last)
        points += lanes
        top = ax.child_axes[0] if lanes else ax
        top.set_title(plotting.title(plotting.name_of(row), cells, row))
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    handles = [plotting.plt.Rectangle((0, 0), 1, 1, color=c, label=WORDS[s]) for s, c in PAGES.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=4)
    return fig, pd.DataFrame(points)


def _draw(ax: Axes, row: dict) -> list[dict]:
    line, name = row["kv_timeline"], plotting.name_of(row)
    ax.stackplot(line["time_s"], *(line[s] for s in PAGES), colors=PAGES.values(), step="post", lw=0)
    ax.set_xlabel("seconds")
    ax.set_ylabel("KV pages")
    columns = {"cell_id": row["cell_id"], "series": name}
    return [columns | {k: v[i] for k, v in line.items()} for i in range(len(line["time_s"]))]


def _lanes(ax: Axes, row: dict, last: float) -> list[dict]:
    """Above the pages, a lane for each kind of step that ran."""
    line = row.get("step_timeline")
    if not line:
        return []
    names = [stage for stage in LANES if stage in line["stage"]]
    strip = ax.inset_axes((0, 1.03, 1, LANE_HEIGHT * len(names)))
    runs = list(zip(line["stage"], line["start_s"], line["end_s"], strict=True))
    for place, stage in enumerate(names):
        spans = [(start, end - start) for each, start, end in runs if each == stage]
        strip.broken_barh(spans, (place + 0.1, 0.8), color=LANES[stage], lw=0)
    strip.set(xlim=(0, last), ylim=(0, len(names)), xticks=[])
    strip.set_yticks([place + 0.5 for place in range(len(names))], names)
    strip.tick_params(length=0)
    strip.grid(False)
    columns = {"cell_id": row["cell_id"], "series": plotting.name_of(row)}
    return [columns | {k: v[i] for k, v in line.items()} for i in range(len(line["stage"]))]


if __name__ == "__main__":
    plotting.run("timeline", draw)
