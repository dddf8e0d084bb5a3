"""The serving figures, each with the CSV of its numbers: latency and its spread, throughput, memory, stages, pages."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from serving_rows import told_apart

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
SPREADS = {"tpot_s": "time per output token, requests", "token_gap_s": "time between two tokens, all"}
PERCENTILES = ("p50", "p90", "p99")
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
    """One line per row; `engine` is policy and setting, its name in legends."""
    return pd.DataFrame(
        {"model": row["model"], "engine": _engine(row)}
        | {name: row[name] for name in PLAIN}
        | {
            f"{name}_{p}": (row[name] or {}).get(p)
            for name in DISTRIBUTIONS
            for p in ("mean", "p50", "p90", "p99")
        }
        | {stage: (row["stage_share"] or {}).get(stage) for stage in STAGE_COLOURS}
        for row in rows
    )


def _engine(row: Row) -> str:
    held = "" if row["immediate_release"] else ", pages held"
    return f"{row['policy']}, {row['setting']}{held}"


@dataclass(frozen=True)
class Panel:
    """A column of `frame` against the request rate."""

    column: str
    label: str
    scale: float = 1.0
    log: bool = False


def curves(cells: pd.DataFrame, panels: Sequence[Sequence[Panel]], height: float) -> Figure:
    """Rows of panels, for each model its own; a line per engine, of one colour for all models."""
    models, engines = list(cells["model"].unique()), list(cells["engine"].unique())
    names = [f"{model}/{i}" for model in models for i in range(len(panels))]
    fig, axes = plotting.grid(names, [panel.column for panel in panels[0]], height=height)
    for at, ax_row in enumerate(axes):
        model, shown = models[at // len(panels)], panels[at % len(panels)]
        part = cells[cells["model"] == model]
        for ax, panel in zip(ax_row, shown, strict=True):
            lines(ax, part, panel, engines)
            ax.set_title(f"{model}\n{panel.label}" if len(models) > 1 else panel.label)
    marks = [Line2D([], [], **_style(engines, name), label=name) for name in engines]
    columns = 3 if len(panels[0]) > 2 else 2
    fig.legend(handles=marks, loc="outside upper center", ncols=columns)
    return fig


def lines(ax: Axes, cells: pd.DataFrame, panel: Panel, engines: Sequence[str]) -> None:
    for name, part in cells.groupby("engine", sort=False):
        part = part.sort_values("rate")
        ax.plot(part["rate"], part[panel.column].astype(float) * panel.scale, **_style(engines, name))
    ax.set_xlabel("requests per second")
    if panel.log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def _style(engines: Sequence[str], name: str) -> dict[str, Any]:
    number = engines.index(name)
    return {
        "marker": plotting.MARKERS[number % len(plotting.MARKERS)],
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": "-" if number < len(COLOURS) else "--",
        "markerfacecolor": None if number < len(COLOURS) else "white",
        "markersize": 4.5,
        "linewidth": 1.3,
    }


def latency(rows: Sequence[Row]) -> Drawn:
    cells = frame(rows)
    names = ("TTFT, s", "time per output token, ms", "normalised latency, s per token")
    panels = [
        [
            Panel(
                f"{name}_{kind}", f"{title} ({kind})", 1000.0 if name == "tpot_s" else 1.0, name != "tpot_s"
            )
            for name, title in zip(DISTRIBUTIONS, names, strict=True)
        ]
        for kind in ("mean", "p99")
    ]
    return curves(cells, panels, 2.7), _shown(cells, [c for c in cells if c.startswith(DISTRIBUTIONS)])


def spread(rows: Sequence[Row]) -> Drawn:
    """How the time per output token spreads over requests, and that between two tokens over all of them, at every
    engine's highest sustained rate."""
    several = len({row["model"] for row in rows}) > 1
    models = list(dict.fromkeys(row["model"] for row in rows))
    top = {
        (f"{row['model']}: " if several else "") + _engine(row): row
        for row in sorted(rows, key=lambda row: (models.index(row["model"]), row["rate"]))
        if row["sustained"]
    }
    fig, axes = plotting.grid([""], list(SPREADS), width=5.5, height=max(2.0, 0.5 + 0.24 * len(top)))
    points = []
    for ax, (field, title) in zip(axes[0], SPREADS.items(), strict=True):
        for name, row in top.items():
            values = {p: 1e3 * row[field][p] for p in PERCENTILES} if row.get(field) else {}
            ax.plot(list(values.values()), [name] * len(values), color="#9aa0a6", lw=1.3, zorder=1)
            for number, (p, value) in enumerate(values.items()):
                ax.scatter(value, name, color=COLOURS[number], s=24, label=p, zorder=2)
            known = {"model": row["model"], "engine": _engine(row), "rate": row["rate"], "what": field}
            points.append(known | values)
        ax.set_title(title)
        ax.set_xlabel("ms")
        ax.set_xscale("log")
        ax.invert_yaxis()
    axes[0][1].tick_params(labelleft=False)
    named = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    if named:
        fig.legend(named.values(), named.keys(), loc="outside upper center", ncols=3)
    return fig, pd.DataFrame(points, columns=["engine", "rate", "model", "what", *PERCENTILES])


def throughput(rows: Sequence[Row]) -> Drawn:
    cells = frame(rows)
    panels = [
        Panel("output_tok_s", "generated tokens per second"),
        Panel("requests_s", "finished requests per second"),
        Panel("goodput_requests_s", "requests per second within the SLO"),
    ]
    return curves(cells, [panels], 2.8), _shown(cells, [panel.column for panel in panels])


def memory(rows: Sequence[Row]) -> Drawn:
    cells = frame(rows)
    panels = [
        Panel(f"{kind}_kv_bytes", f"KV memory in use, {kind}, MiB", 2.0**-20) for kind in ("mean", "peak")
    ]
    return curves(cells, [panels], 2.8), _shown(cells, [panel.column for panel in panels])


def _shown(cells: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    return cells[["engine", "rate", "model", "status", *columns]]


def stages(rows: Sequence[Row]) -> Drawn:
    """At every engine's highest rate."""
    cells = frame(rows)
    measured = cells.dropna(subset=["prefill"]).sort_values("rate")
    top = measured.groupby(["model", "engine"], sort=False).tail(1).sort_values("model", kind="stable")
    several = cells["model"].nunique() > 1
    names = [
        f"{row.model + ': ' if several else ''}{row.engine} at {row.rate:g}/s" for row in top.itertuples()
    ]
    fig, axes = plotting.grid([""], [""], width=10 if several else 7.5, height=max(1.8, 0.3 * len(top)))
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
    return fig, _shown(cells, list(STAGE_COLOURS))


def pages(rows: Sequence[Row]) -> Drawn:
    """Pages in use at every engine's highest rate, by the stage of the requests that own them."""
    highest = sorted(rows, key=lambda r: (r["model"], r["rate"]))
    last = {(row["model"], _engine(row)): row for row in highest if row["pages_over_time"]}
    several = len({model for model, _ in last}) > 1
    keys = list(last)
    columns = min(3, max(1, len(keys)))
    table = [keys[i : i + columns] for i in range(0, len(keys), columns)] or [[]]
    fig, axes = plotting.grid([str(i) for i in range(len(table))], [str(i) for i in range(columns)], 3.4, 2.0)
    points = []
    for number, ax in enumerate(axes.flat):
        if number >= len(keys):
            ax.set_axis_off()
            continue
        model, engine = keys[number]
        row = last[keys[number]]
        stacks = [[sample[kind] for sample in row["pages_over_time"]] for kind in PAGE_COLOURS]
        times = [sample["time_s"] for sample in row["pages_over_time"]]
        ax.stackplot(
            times, stacks, colors=list(PAGE_COLOURS.values()), labels=list(PAGE_COLOURS), step="post"
        )
        ax.set_title(f"{model}\n" * several + f"{engine} at {row['rate']:g}/s", fontsize=7.5)
        ax.set_xlabel("s")
        ax.set_ylabel("pages")
        known = {"engine": engine, "rate": row["rate"], "model": model}
        points += [known | sample for sample in row["pages_over_time"]]
    if keys:
        fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig, pd.DataFrame(points)


FIGURES: dict[str, Callable[[Sequence[Row]], Drawn]] = {
    "serving_latency": latency,
    "serving_spread": spread,
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
