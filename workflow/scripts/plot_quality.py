"""Quality against its price: a mark per method and ratio, guard rows in grey. Left KV bytes, right speed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plotting import MARKERS
from quality_findings import points

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GUARD = "#9aa0a6"
LEGEND_CHARACTERS = 80  # of labels side by side
PRICES = {
    "kv_bytes_share": "share of the 16-bit cache's bytes",
    "speedup": "throughput over the whole cache's",
}


def draw(found: pd.DataFrame) -> Figure:
    models = list(dict.fromkeys(found["model"])) if len(found) else [""]
    labels = list(dict.fromkeys(found[~found["guard"]]["label"])) if len(found) else []
    columns = min(4, max(1, LEGEND_CHARACTERS // max(map(len, labels), default=1)))
    lines = -(-len(labels) // columns)
    fig, axes = plotting.grid(models, list(PRICES), height=3.1 + 0.2 * max(0, lines - 3) / len(models))
    for i, model in enumerate(models):
        part = found[found["model"] == model] if len(found) else found
        for j, (price, name) in enumerate(PRICES.items()):
            known = part.dropna(subset=[price, "score"]) if len(part) else part
            if known.empty:
                axes[i][j].text(0.5, 0.5, "not measured", ha="center", transform=axes[i][j].transAxes)
                continue
            _panel(axes[i][j], known, price, labels)
            axes[i][j].set_xlabel(name)
            axes[i][j].set_ylabel(part["score_name"].iloc[0])
            axes[i][j].set_title(model)
    marks = [_mark(labels.index(label), label) for label in labels]
    if marks:
        fig.legend(
            handles=marks, loc="outside upper center", ncols=min(len(marks), columns), handletextpad=0.3
        )
    return fig


def _panel(ax: Axes, part: pd.DataFrame, price: str, labels: list[str]) -> None:
    for label, own in part.groupby("label", sort=False):
        guard = bool(own["guard"].iloc[0])
        colour, shape = (GUARD, "x") if guard else _style(labels.index(label))
        own = own.sort_values(price)
        ax.errorbar(
            own[price],
            own["score"],
            yerr=own["score_se"].astype(float).fillna(0),
            color=colour,
            marker=shape,
            linestyle=":" if guard else "-",
            linewidth=0.9,
            markersize=5,
            elinewidth=0.7,
        )
        if guard:
            last = own.iloc[-1]
            ax.annotate(label, (last[price], last["score"]), (3, 3), textcoords="offset points", fontsize=7)


def _style(index: int) -> tuple[str, str]:
    """Colour and shape, another pair for each label even where both run out."""
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)]


def _mark(index: int, label: str) -> plotting.plt.Line2D:
    colour, shape = _style(index)
    return plotting.plt.Line2D([], [], color=colour, marker=shape, label=label, markersize=5, linewidth=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--rows", "--speed", "--svg", "--csv"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    found = pd.DataFrame(points(plotting.read_rows(args.rows), plotting.read_rows(args.speed)))
    plotting.write_figure("quality", draw(found), found, args.svg, args.csv)


if __name__ == "__main__":
    main()
