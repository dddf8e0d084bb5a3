"""The serving figures, each with the CSV of its numbers: latency, throughput, memory, stages, pages over time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from serving_findings import told_apart

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5f6368", "#000000")
STAGE_COLOURS = {
    "prefill": "#0072B2",
    "mixed": "#56B4E9",
    "decode": "#009E73",
    "compress": "#D55E00",
    "idle": "#e6e8eb",
}
PAGE_COLOURS = {"before": "#0072B2", "compressed": "#D55E00", "whole": "#5f6368", "held": "#E69F00"}
DISTRIBUTIONS = ("ttft_s", "tpot_s", "normalised_latency_s")
PLAIN = (
    "rate",
    "output_tok_s",
    "requests_s",
    "goodput_requests_s",
    "peak_kv_bytes",
    "mean_kv_bytes",
    "status",
)
Row = dict[str, Any]
Drawn = tuple[Figure, pd.DataFrame]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per row, in order of engine and rate; `engine` is its name in legends."""
    several = len({row["model"] for row in rows}) > 1
    return pd.DataFrame(
        {"engine": _engine(row, several)}
        | {name: row[name] for name in PLAIN}
        | {
            f"{name}_{p}": (row[name] or {}).get(p)
            for name in DISTRIBUTIONS
            for p in ("mean", "p50", "p90", "p99")
        }
        | {stage: (row["stage_share"] or {}).get(stage) for stage in STAGE_COLOURS}
        for row in rows
    )


def _engine(row: Row, several: bool) -> str:
    held = "" if row["immediate_release"] else ", pages held"
    return f"{row['model'] + ': ' if several else ''}{row['policy']}, {row['setting']}{held}"


def lines(
    ax: Axes, cells: pd.DataFrame, column: str, label: str, scale: float = 1.0, log: bool = False
) -> None:
    for number, (name, part) in enumerate(cells.groupby("engine", sort=False)):
        part = part.sort_values("rate")
        ax.plot(
            part["rate"],
            part[column].astype(float) * scale,
            marker=plotting.MARKERS[number % len(plotting.MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            linestyle="-" if number < len(COLOURS) else "--",
            markersize=4.5,
            linewidth=1.3,
            label=name,
        )
    ax.set_title(label)
    ax.set_xlabel("requests per second")
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def legend(fig: Figure, ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper center", ncols=3)


def latency(rows: Sequence[Row]) -> Drawn:
    cells = frame(rows)
    fig, axes = plotting.grid(["mean", "p99"], list(DISTRIBUTIONS), height=2.7)
    names = ("TTFT, s", "time per output token, ms", "normalised latency, s per token")
    for i, kind in enumerate(("mean", "p99")):
        for j, (name, title) in enumerate(zip(DISTRIBUTIONS, names, strict=True)):
            scale = 1000.0 if name == "tpot_s" else 1.0
            lines(axes[i][j], cells, f"{name}_{kind}", f"{title} ({kind})", scale, log=name != "tpot_s")
    legend(fig, axes[0][0])
    return fig, cells[["engine", "rate", "status", *(c for c in cells if c.startswith(DISTRIBUTIONS))]]


def throughput(rows: Sequence[Row]) -> Drawn:
    cells = frame(rows)
    fig, axes = plotting.grid([""], ["tokens", "requests", "goodput"], height=2.8)
    lines(axes[0][0], cells, "output_tok_s", "generated tokens per second")
    lines(axes[0][1], cells, "requests_s", "finished requests per second")
    lines(axes[0][2], cells, "goodput_requests_s", "goodput: requests per second within the SLO")
    legend(fig, axes[0][0])
    return fig, cells[["engine", "rate", "status", "output_tok_s", "requests_s", "goodput_requests_s"]]


def memory(rows: Sequence[Row]) -> Drawn:
    cells = frame(rows)
    fig, axes = plotting.grid([""], ["mean", "peak"], height=2.8)
    for ax, kind in zip(axes[0], ("mean", "peak"), strict=True):
        lines(ax, cells, f"{kind}_kv_bytes", f"KV memory in use, {kind}, MiB", 2.0**-20)
    legend(fig, axes[0][0])
    return fig, cells[["engine", "rate", "status", "mean_kv_bytes", "peak_kv_bytes"]]


def stages(rows: Sequence[Row]) -> Drawn:
    """At every engine's highest rate."""
    cells = frame(rows)
    top = cells.dropna(subset=["prefill"]).sort_values("rate").groupby("engine", sort=False).tail(1)
    names = [f"{row.engine} at {row.rate:g}/s" for row in top.itertuples()]
    fig, axes = plotting.grid([""], [""], width=7.5, height=max(1.8, 0.32 * len(top)))
    ax, left = axes[0][0], [0.0] * len(top)
    for stage, colour in STAGE_COLOURS.items():
        shares = [float(value) for value in top[stage]]
        ax.barh(names, shares, left=left, color=colour, label=stage, height=0.7)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    ax.set_xlim(0, 1.001)
    ax.set_xlabel("share of the time")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return fig, cells[["engine", "rate", "status", *STAGE_COLOURS]]


def pages(rows: Sequence[Row]) -> Drawn:
    """Pages in use at every engine's highest rate, by the stage of the requests that own them."""
    several = len({row["model"] for row in rows}) > 1
    last = {
        _engine(row, several): row for row in sorted(rows, key=lambda r: r["rate"]) if row["pages_over_time"]
    }
    names = list(last)
    columns = min(3, max(1, len(names)))
    table = [names[i : i + columns] for i in range(0, len(names), columns)] or [[]]
    fig, axes = plotting.grid([str(i) for i in range(len(table))], [str(i) for i in range(columns)], 3.4, 2.0)
    points = []
    for number, ax in enumerate(axes.flat):
        if number >= len(names):
            ax.set_axis_off()
            continue
        samples = last[names[number]]["pages_over_time"]
        stacks = [[sample[kind] for sample in samples] for kind in PAGE_COLOURS]
        times = [sample["time_s"] for sample in samples]
        ax.stackplot(
            times, stacks, colors=list(PAGE_COLOURS.values()), labels=list(PAGE_COLOURS), step="post"
        )
        ax.set_title(f"{names[number]}\nat {last[names[number]]['rate']:g}/s", fontsize=7.5)
        ax.set_xlabel("s")
        ax.set_ylabel("pages")
        points += [
            {"engine": names[number], "rate": last[names[number]]["rate"], **sample} for sample in samples
        ]
    if names:
        fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig, pd.DataFrame(points)


FIGURES: dict[str, Callable[[Sequence[Row]], Drawn]] = {
    "serving_latency": latency,
    "serving_throughput": throughput,
    "serving_memory": memory,
    "serving_stages": stages,
    "serving_pages": pages,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where NAME.svg and NAME.csv of each go")
    args = parser.parse_args()
    rows = told_apart(plotting.read_rows(args.rows))
    for name, draw in FIGURES.items():
        plt.rcParams["svg.hashsalt"] = name
        figure, points = draw(rows)
        part = args.folder / f"{name}.part"
        figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
        os.replace(part, args.folder / f"{name}.svg")
        points.to_csv(args.folder / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
