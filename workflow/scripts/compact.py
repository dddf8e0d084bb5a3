"""Figures of many cells, a line for each, where panels would fill pages and stand half empty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import plotting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from naming import BASELINE

MOST = 2 * plotting.BESIDE  # cells that panels show well
INCHES = 8.6
TALL = 40  # lines whose scale below is out of sight of the first


def fits(cells: pd.DataFrame) -> bool:
    """Whether lines show these cells better than panels: there are many, and the batch size is no axis, or not all
    requests have all settings."""
    settings = {panel: set(part["setting"]) for panel, part in cells.groupby("panel")}
    sparse = any(each | {BASELINE} != set(cells["setting"]) | {BASELINE} for each in settings.values())
    one_batch = cells.groupby("panel")["batch_size"].nunique().max() == 1
    return len(cells) > MOST and (one_batch or sparse)


def sheet(cells: pd.DataFrame, titles: Sequence[str]) -> tuple[Figure, list[Axes], list[tuple[float, Any]]]:
    """(figure, axes side by side, (height, cell) from the top down). Cells of the same requests stand together under
    their name, smaller batches first, the baseline before what is compared with it."""
    plotting.theme()
    one = cells.loc[cells["setting"] != BASELINE, "series"].nunique() <= 1
    heads, lines, y = [], [], 0.0
    place = {panel: i for i, panel in enumerate(cells["panel"].unique())}
    groups = list(cells.groupby(["panel", "batch_size"]))
    for (panel, batch), part in sorted(groups, key=lambda group: (place[group[0][0]], group[0][1])):
        heads.append((y, f"{panel}, batch {batch}"))
        found = list(part.itertuples())
        found.sort(key=lambda row: row.setting != BASELINE)
        lines += [(y + 1 + i, row) for i, row in enumerate(found)]
        y += len(found) + 1.5
    size = (INCHES, 0.19 * y + 0.9)
    fig, axes = plotting.plt.subplots(
        1, len(titles), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="x", labeltop=y > TALL)
        ax.spines[["top", "right"]].set_visible(False)  # names of requests may be longer than an axes is wide
    first = axes[0][0]
    first.set_zorder(1)  # above its neighbours, which names of requests may reach into
    first.patch.set_visible(False)
    first.set_yticks([y for y, _ in lines], [_label(row, one) for _, row in lines])
    first.set_ylim(y - 1, -0.8)
    for height, head in heads:
        first.text(
            0.0, height, head, transform=first.get_yaxis_transform(), va="center", weight="bold", size=7.5
        )
    plotting.legend(fig, plotting.order(cells["variant"]))
    return fig, list(axes[0]), lines


def _label(row: Any, one: bool) -> str:
    if row.setting == BASELINE:
        return row.series
    return row.setting if one else f"{row.series}, {row.setting}"


def bars(
    ax: Axes,
    lines: Sequence[tuple[float, Any]],
    field: str,
    scale: float = 1.0,
    more: Any = None,
    end: str | None = None,
    absent: str = "",
) -> None:
    """A bar of `field` and its number behind `end`, or behind the bar; more: what to write after it, of a cell; absent:
    what to say where a cell succeeded and has no such number."""
    for y, row in _numbers(ax, lines, field, absent):
        value = getattr(row, field) * scale
        ax.barh(y, value, height=0.8, color=plotting.colour(row.series))
        ax.text(
            getattr(row, end) * scale if end else value,
            y,
            f" {value:,.0f}{more(row) if more else ''}",
            va="center",
            size=7,
        )
    ax.margins(x=0.25)
    ax.set_xlim(left=0)


def spans(
    ax: Axes, lines: Sequence[tuple[float, Any]], low: str, high: str | None, scale: float = 1.0
) -> None:
    """A mark at `low`, a line from there to `high`."""
    for y, row in _numbers(ax, lines, low):
        value, look = getattr(row, low) * scale, {"color": plotting.colour(row.series)}
        if high is not None:
            ax.hlines(y, value, getattr(row, high) * scale, linewidth=1.6, alpha=0.55, **look)
        ax.scatter(value, y, s=20, zorder=3, edgecolors="white", linewidths=0.5, **look)


def _numbers(
    ax: Axes, lines: Sequence[tuple[float, Any]], field: str, absent: str = ""
) -> Iterator[tuple[float, Any]]:
    """Lines that have a number; the others say why they have none."""
    for y, row in lines:
        if pd.isna(getattr(row, field)):
            known = absent and row.status == "ok"
            missing(ax, y, *((absent, "#5f6368") if known else (row.status,)))
        else:
            yield y, row


def missing(ax: Axes, y: float, why: str, colour: str = "#a50e0e") -> None:
    """A cell without a number is named where its mark would stand."""
    ax.text(0.01, y, why, transform=ax.get_yaxis_transform(), va="center", size=6.5, color=colour)
