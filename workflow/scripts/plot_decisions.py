"""Step times as the engine predicted and as it measured them, and how seconds per token spread over requests."""

from __future__ import annotations

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure

KINDS = {"prefill": "o", "decode": "s", "mixed": "^", "aside": "D", "beside": "v"}


def draw(cells: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    decided = [row for row in cells["row"] if row.get("decisions")]
    fig, axes = plotting.grid([""], ["predicted", "spread"] if decided else ["spread"], height=3.2)
    points = _predictions(axes[0][0], decided) if decided else []
    shown = plotting.largest(cells)
    points += _spread(axes[0][-1], shown)
    if shown:
        axes[0][-1].set_title(plotting.title("time per output token", cells, shown[0]))
    return fig, pd.DataFrame(points)


def _predictions(ax: Axes, rows: list[dict]) -> list[dict]:
    points = []
    for row in rows:
        for kind, steps in row["decisions"]["steps"].items():
            if steps["count"]:
                values = [1e3 * steps[f"{side}_s"] / steps["count"] for side in ("predicted", "measured")]
                ax.scatter(*values, marker=KINDS[kind], color=plotting.colour(row["variant"]), s=22)
                names = {"cell_id": row["cell_id"], "series": row["variant"], "what": f"{kind} step ms"}
                points.append(names | dict(zip(("predicted", "measured"), values, strict=True)))
    ax.set_title("a step's mean time")
    ax.set_xlabel("predicted, ms")
    ax.set_ylabel("measured, ms")
    if not points:
        ax.text(0.5, 0.5, "no step was predicted", ha="center", transform=ax.transAxes)
        return points
    least = min(point["predicted"] for point in points)
    ax.axline((least, least), slope=1, color="#9aa0a6", lw=0.8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    handles = [
        plotting.plt.Line2D([], [], marker=m, ls="", color="#3c4043", label=k) for k, m in KINDS.items()
    ]
    ax.legend(handles=handles)
    return points


def _spread(ax: Axes, rows: list[dict]) -> list[dict]:
    points = []
    for row in rows:
        values = row.get("tpot_quantiles_s")
        if values is None:
            continue
        shares, name = [5 * i for i in range(len(values))], plotting.name_of(row)
        ax.plot([1e3 * v for v in values], shares, color=plotting.colour(row["variant"]), label=name, lw=1.3)
        names = {"cell_id": row["cell_id"], "series": name, "what": "TPOT ms"}
        points += [names | {"percent": p, "measured": 1e3 * v} for p, v in zip(shares, values, strict=True)]
    ax.set_xlabel("ms")
    ax.set_ylabel("percent of requests")
    if points:
        ax.legend(fontsize=6.5)
    return points


if __name__ == "__main__":
    plotting.run("decisions", draw)
