"""The serving page: one HTML file that opens offline, from the serving table and its figures."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import plotting
from plot_serving import FIGURES
from render_report import data_uri, distinct, inline_svg, templates
from serving_findings import claims
from serving_overview import overview, side_by_side
from serving_rows import engines, measured, told_apart

from fastcache.config import STATIC_POLICY

FAR = 2.0  # times as long: with few requests a p99 varies


def context(rows: list[dict[str, Any]], status: dict[str, Any], title: str, figures: Path) -> dict[str, Any]:
    """Everything the template may name."""
    return {
        "title": title,
        "rows": rows,
        "status": status,
        "busy": sum(bool(row["host_busy"]) for row in rows),
        "claims": claims(rows),
        "overview": overview(rows),
        "side_by_side": side_by_side(rows),
        "notes": notes(rows),
        "devices": distinct(row["device"] for row in rows),
        "weights": distinct({"model": row["model"], **row["weights"]} for row in rows if row["weights"]),
        "commits": distinct(row["git_commit"] for row in rows),
        "workloads": distinct({"model": row["model"], **row["cell"]["workload"]} for row in rows),
        "limits": distinct(
            {"model": row["model"]}
            | {
                name: row["cell"][name]
                for name in ("window_s", "drain_s", "slo_ttft_s", "slo_tpot_s", "sustained_ttft_s")
            }
            for row in rows
        ),
        "figures": {
            name: {
                "svg": inline_svg(figures / f"{name}.svg", name, name.replace("_", " ")),
                "csv": data_uri(figures / f"{name}.csv"),
            }
            for name in FIGURES
        },
    }


def notes(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Each note, with the rows that carry it; a row of another commit than most has that as a note."""
    found: dict[str, list[str]] = {}
    ((usual, _),) = Counter(row["git_commit"] for row in rows).most_common(1)
    for row in rows:
        own = [f"measured at commit {row['git_commit']}"] if row["git_commit"] != usual else []
        for note in [*own, *(row["notes"] or ())]:
            found.setdefault(note, []).append(row["row_id"])
    return found | {note: [row_id] for note, row_id in slower_than_more(rows)}


def slower_than_more(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(note, row) where an engine was far slower than at its next higher rate. A policy that waits for full batches is
    that by design."""
    said = []
    for model, policy, setting, release in engines(rows):
        own = measured(rows, model=model, policy=policy, setting=setting, immediate_release=release)
        for less, more in pairwise([] if re.fullmatch(STATIC_POLICY, policy) else own):
            slow, fast = (1e3 * row["ttft_s"]["p99"] for row in (less, more))
            if slow > FAR * fast:
                note = (
                    f"p99 of TTFT is {slow:,.0f} ms at {less['rate']:g}/s and {fast:,.0f} at {more['rate']:g}/s, so "
                    "something else than load was in it, such as what sizes cost that come up first: compare nothing "
                    "at this rate"
                )
                said.append((note, less["row_id"]))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--rows", "--status", "--figures", "--templates", "--output"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--title", default="Serving under load")
    args = parser.parse_args()
    rows = told_apart(plotting.read_rows(args.rows))
    status = json.loads(args.status.read_text(encoding="utf-8"))
    page = templates(args.templates).get_template("serving.html.j2")
    part = args.output.with_suffix(".part")
    part.write_text(page.render(context(rows, status, args.title, args.figures)), encoding="utf-8")
    os.replace(part, args.output)


if __name__ == "__main__":
    main()
