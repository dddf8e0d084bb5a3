"""What the figures share: rows, names, colours, grouped marks, and saving the same bytes every time."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from naming import BASELINE, differing, name_of, one_model, requests, series, setting

# Okabe and Ito's palette: its members stay apart under every common colour blindness and in grey print.
VARIANT_COLOURS = {
    "baseline": "#5f6368",
    "compression-only": "#0072B2",
    "greenctx-only": "#E69F00",
    "auto-tune+greenctx": "#009E73",
    "triad": "#CC79A7",
}
BESIDE = 3  # panels across the page
PANEL = 3.9  # inches, one of several
ALONE = 4.7  # inches, a panel that has the page to itself: 60 % of the width of two
MARKERS = "osD^vP*X"


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One line per cell, with the names that figures show: panel (model and requests), setting, series."""
    alone = one_model(rows)
    said = differing(rows)
    one_split = len({row["greenctx_compress_ratio"] for row in rows if row["greenctx"]}) <= 1
    return pd.DataFrame(
        {
            "cell_id": row["cell_id"],
            "panel": requests(row, alone, said),
            "batch_size": row["batch_size"],
            "variant": row["variant"],
            "series": row["variant"] if one_split else series(row),
            "setting": setting(row),
            "status": row["status"],
            "row": row,
        }
        | {name: row[name] for name in ("throughput_tok_s", "peak_kv_bytes", "kv_len_before", "kv_len_after")}
        | _spread(row)
        | {
            f"{name}_{p}": (row[f"{name}_s"] or {}).get(p)
            for name in ("ttft", "tpot")
            for p in ("p50", "p99")
        }
        | {name: (row["agreement"] or {}).get(name) for name in ("token_match", "prefix_match")}
        for row in rows
    )


def largest(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per variant and policy, of the requests that most variants were measured on; of several, those with the
    most tokens. A sweep over splits is no variant more."""
    rows = [row for row in cells["row"] if row["status"] == "ok"]
    variants: dict[int, set[str]] = {}
    for row in rows:
        variants.setdefault(row["total_tokens"], set()).add(name_of(row))
    size = max(variants, key=lambda tokens: (len(variants[tokens]), tokens), default=0)
    found = {name_of(row): row for row in reversed(rows) if row["total_tokens"] == size}
    return [found[name] for name in order(found)]


def title(name: str, cells: pd.DataFrame, row: dict[str, Any]) -> str:
    """`name`, and under it what figures call the requests of `row`, broken as a panel is wide."""
    return f"{name}\n{textwrap.fill(cells.loc[cells['cell_id'] == row['cell_id'], 'panel'].iloc[0], 44)}"


def nothing(why: str) -> Figure:
    """A figure that says why it shows nothing."""
    fig, axes = grid([""], [""], height=1.2)
    axes[0][0].text(0.5, 0.5, why, ha="center", va="center")
    axes[0][0].set_axis_off()
    return fig


def _spread(row: dict[str, Any]) -> dict[str, float | None]:
    values = row["repeats"]["values"] if row["repeats"] else [None]
    return (
        {"throughput_min": min(values), "throughput_max": max(values)}
        if values[0]
        else dict.fromkeys(("throughput_min", "throughput_max"))
    )


def order(values: Iterable[str]) -> list[str]:
    """Variants in their own order (splits of one stay together), anything else as it first appears."""
    names = list(dict.fromkeys(values))
    rank = {name: i for i, name in enumerate(VARIANT_COLOURS)}
    return sorted(names, key=lambda name: rank.get(name.split(" ")[0], -1))


def colour(series: str) -> str:
    return VARIANT_COLOURS[series.split(" ")[0]]


def theme() -> None:
    sns.set_theme(style="whitegrid", context="paper", font="DejaVu Sans")
    plt.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
            "font.family": ["DejaVu Sans"],
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.labelsize": 9,
            "axes.edgecolor": "#c4c7cc",
            "grid.color": "#e6e8eb",
            "legend.frameon": False,
        }
    )


def grid(
    rows: Sequence[str], columns: Sequence[str], width: float | None = None, height: float = 2.6
) -> tuple:
    """(figure, axes[row][column]). Rows of one column stand beside each other, and many columns in several lines.
    `width`: inches of a panel, as usual where it is None."""
    theme()
    beside = min(len(rows), BESIDE) if len(columns) == 1 else 1
    folds = -(-len(columns) // BESIDE)
    each = -(-len(columns) // folds)
    lines, across = -(-len(rows) // beside) * folds, beside * each
    width = (ALONE if across == 1 else PANEL) if width is None else width
    size = (width * across, height * lines + 0.5)
    fig, axes = plt.subplots(lines, across, figsize=size, squeeze=False, layout="constrained")
    axes = axes.reshape(-1, folds * each)
    for spare in (*axes[len(rows) :].flat, *axes[:, len(columns) :].flat):
        spare.set_axis_off()
    return fig, axes[: len(rows), : len(columns)]


def dodge(series: Sequence[str], width: float = 0.8) -> dict[str, float]:
    """Where each series stands beside the middle of its group, and how wide its place is under ``""``."""
    step = width / max(1, len(series))
    return {"": step} | {name: (i - (len(series) - 1) / 2) * step for i, name in enumerate(series)}


def draw_points(
    ax: Axes, part: pd.DataFrame, series: Sequence[str], settings: Sequence[str], low: str, high: str | None
) -> None:
    """A mark per cell at `low`, a line from there to `high`. Groups are batch sizes, shapes are methods."""
    place = dodge(series)
    groups = sorted(part["batch_size"].unique())
    inner = dodge([s for s in settings if s != BASELINE], width=place[""] * 0.8)
    for row in part.itertuples():
        x = groups.index(row.batch_size) + place[row.series] + inner.get(row.setting, 0.0)
        value = getattr(row, low)
        if pd.isna(value):
            mark_missing(ax, x, row.status)
            continue
        if high is not None:
            ax.vlines(x, value, getattr(row, high), color=colour(row.series), linewidth=1.4, alpha=0.55)
        ax.scatter(
            x,
            value,
            s=24,
            color=colour(row.series),
            marker=MARKERS[settings.index(row.setting) % len(MARKERS)],
            zorder=3,
            edgecolors="white",
            linewidths=0.5,
        )
    label_batches(ax, groups)


def from_zero(ax: Axes) -> None:
    """A scale from zero, with room for the marks at its top: the margin is of the data's range, which may be small."""
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)


def mark_missing(ax: Axes, x: float, why: str) -> None:
    """A cell without a number is named where its mark would stand, never drawn as zero."""
    ax.text(
        x,
        0.02,
        why,
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=6.5,
        color="#a50e0e",
        transform=ax.get_xaxis_transform(),
    )


def label_batches(ax: Axes, groups: Sequence[int]) -> None:
    ax.set_xticks(range(len(groups)), [str(g) for g in groups])
    ax.set_xlim(-0.55, len(groups) - 0.45)
    ax.set_xlabel("batch size")
    ax.grid(axis="x", visible=False)


def legend(fig: Figure, series: Sequence[str], settings: Sequence[str] = ()) -> None:
    marks = [
        plt.Line2D([], [], marker="s", linestyle="", color=colour(s), label=s, markersize=7) for s in series
    ]
    marks += [
        plt.Line2D(
            [], [], marker=MARKERS[i % len(MARKERS)], linestyle="", color="#3c4043", label=s, markersize=6
        )
        for i, s in enumerate(settings)
        if s != BASELINE
    ]
    most = min(5, int(fig.get_size_inches()[0] / 1.5))  # more would be cut off at the figure's sides
    fig.legend(handles=marks, loc="outside upper center", ncols=min(len(marks), most), handletextpad=0.3)


Draw = Callable[[pd.DataFrame], tuple[Figure, pd.DataFrame]]


def write_figure(name: str, figure: Figure, points: pd.DataFrame, svg: Path, csv: Path) -> None:
    """The figure and the numbers it shows; equal rows give equal bytes."""
    plt.rcParams["svg.hashsalt"] = name  # element ids from content, not from chance
    figure.savefig(svg.with_suffix(".part"), format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    os.replace(svg.with_suffix(".part"), svg)
    points.to_csv(csv, index=False, lineterminator="\n")


def run(name: str, draw: Draw) -> None:
    """The command line of every figure: `--rows rows.jsonl --svg out.svg --csv out.csv`."""
    parser = argparse.ArgumentParser(description=f"Draw the figure '{name}' from the table's rows.")
    for option in ("--rows", "--svg", "--csv"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()
    write_figure(name, *draw(frame(read_rows(args.rows))), args.svg, args.csv)
