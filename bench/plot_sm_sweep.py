"""Draw what `sm_sweep.py` measured: rate against SMs, and the makespan of concurrent work against its controls.

    python bench/plot_sm_sweep.py results/sm-sweep/sm_sweep.json --output results/sm-sweep

Writes sm_rate.svg and sm_makespan.svg; the CSV behind both is the one `sm_sweep.py` wrote beside its JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

WORKS = ("prefill", "decode", "compress")
CONTROLS = {"sequential": "--", "plain_streams": ":"}
COLOURS = {"prefill": "#33658a", "decode": "#b5652b", "compress": "#5b8c5a"}
Row = dict[str, Any]


def rates(rows: Sequence[Row], work: str) -> list[tuple[int, float]]:
    """(SMs, share of the whole GPU's rate) for `work` running alone, by SMs."""
    alone = [row for row in rows if row["mode"] == "alone" and row["work"] == work]
    whole = next(row["rate"] for row in alone if row["side"] == "whole")
    return sorted((row["sms"], row["rate"] / whole) for row in alone if row["sms"] is not None)


def makespans(rows: Sequence[Row], first: str, second: str) -> list[tuple[int, float]]:
    """(compression side's SMs, milliseconds until both are done) for `first` on main and `second` on compress."""
    together = [row for row in rows if row["mode"] == "together" and row["side"] == "compress"]
    return sorted(
        (row["sms"], row["makespan_ms"])
        for row in together
        if (row["partner"], row["work"]) == (first, second)
    )


def control(rows: Sequence[Row], mode: str, first: str, second: str) -> float:
    """Milliseconds until both are done without a split: in sequence, or on two plain streams."""
    return next(
        row["makespan_ms"]
        for row in rows
        if row["mode"] == mode and (row["work"], row["partner"]) == (first, second)
    )


def pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The (main, compress) pairs of works that were measured together, in order."""
    together = [row for row in rows if row["mode"] == "together" and row["side"] == "main"]
    return list(dict.fromkeys((row["work"], row["partner"]) for row in together))


def draw_rates(rows: Sequence[Row], total: int) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for work in WORKS:
        points = rates(rows, work)
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, color=COLOURS[work], label=work)
    axes.plot([0, total], [0, 1], color="0.7", lw=1, label="in proportion")
    axes.set(
        xlabel="SMs granted", ylabel="rate, share of the whole GPU's", xlim=(0, total + 2), ylim=(0, 1.08)
    )
    axes.legend(frameon=False)
    return figure


def draw_makespans(rows: Sequence[Row]) -> plt.Figure:
    measured = pairs(rows)
    figure, axes = plt.subplots(1, len(measured), figsize=(3.6 * len(measured), 3.6), layout="constrained")
    for axis, (first, second) in zip(axes, measured, strict=True):
        points = makespans(rows, first, second)
        axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=COLOURS[second], label="split")
        for mode, style in CONTROLS.items():
            axis.axhline(
                control(rows, mode, first, second), color="0.4", ls=style, label=mode.replace("_", " ")
            )
        axis.set(title=f"{first} + {second}", xlabel=f"SMs for {second}", ylim=(0, None))
    axes[0].set_ylabel("ms until both are done")
    axes[0].legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, metavar="sm_sweep.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two figures")
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.sweep.read_text())
        rows, total = record["rows"], record["device"]["sm_count"]
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"error: {options.sweep} is not a sweep that sm_sweep.py wrote: {error!r}.\n")
        return 2
    plt.rcParams |= {"svg.hashsalt": "fastcache", "axes.spines.top": False, "axes.spines.right": False}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, figure in (("sm_rate", draw_rates(rows, total)), ("sm_makespan", draw_makespans(rows))):
        figure.savefig(options.output / f"{name}.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
