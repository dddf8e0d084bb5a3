"""The report: one HTML file that opens offline, written from the table, the figures and the templates in `report/`."""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import deciding
import discussion
import findings
import jinja2
import quality_findings
import reproduction
from findings import Row, count, percent, times
from markupsafe import Markup

NUMBER = re.compile(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")  # in a note; none that is part of a name
TEXT_POINTS = 561.6  # width of a figure that fills the page: 7.8 inches, two panels
FIGURES = ("throughput", "latency", "kv_memory", "agreement", "timeline", "decisions", "sm_ratio", "pools")


def environment_facts(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows were measured on and with. A list with more than one entry is a warning in the report."""
    versions: dict[str, list[str]] = {}
    for row in rows:
        for name, version in row["versions"].items():
            if version is not None and version not in versions.setdefault(name, []):
                versions[name].append(version)
    started = sorted(row["started_at"] for row in rows)
    return {
        # A virtual machine's memory may grow while it is used: that makes no other machine.
        "devices": distinct(row["device"] and row["device"] | {"host_memory_bytes": None} for row in rows),
        "versions": {name: found for name, found in sorted(versions.items()) if found},
        "commits": distinct(row["git_commit"] for row in rows),
        "digests": distinct(row["source_digest"] for row in rows),
        "weights": distinct({"model": row["model"], **row["weights"]} for row in rows if row["weights"]),
        "attention": distinct(row["attention_backend"] for row in rows),
        "dtypes": distinct(row["dtype"] for row in rows),
        "texts": distinct(
            {"workload": row["workload"], "source": row["text_source"]} for row in rows if row["text_source"]
        ),
        "ceilings": ceilings(rows),
        "repeats": distinct(row["cell"]["repeats"] for row in rows),
        "warmup": distinct(row["cell"]["warmup"] for row in rows),
        "seeds": distinct(row["seed"] for row in rows),
        "shared_process": max((row["process_cells_before"] or 0 for row in rows), default=0),
        "longest_prompt": max((row["context_used"] for row in rows if row["context_used"]), default=None),
        "first": started[0] if started else None,
        "last": started[-1] if started else None,
        "notes": notes(rows),
    }


def notes(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """What rows note, and how many of them, the most frequent first. Notes that differ in numbers alone are one, with
    the range of each number."""
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        for note in row["notes"]:
            alike.setdefault(tuple(NUMBER.split(note)), []).append(NUMBER.findall(note))
    found = []
    for words, numbers in alike.items():
        spans = ["", *(_span(values) for values in zip(*numbers, strict=True))]
        found.append(("".join(span + word for span, word in zip(spans, words, strict=True)), len(numbers)))
    return sorted(found, key=lambda each: -each[1])


def _span(numbers: Iterable[str]) -> str:
    ends = sorted(set(numbers), key=lambda text: float(text.replace(",", "")))
    return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def ceilings(rows: Sequence[Row]) -> dict[str, str] | None:
    """The range over the cells of what the device was seen to do at most; None where no row tells."""

    def seen(field: str, unit: float) -> str:
        found = [row[field] / unit for row in rows if row[field]]
        ends = [f"{end:,.0f}" if end >= 1000 else f"{end:.3g}" for end in (min(found), max(found))]
        return " to ".join(dict.fromkeys(ends))

    if not any(row["ceiling_copy_bytes_s"] for row in rows):
        return None
    return {"copy_gb_s": seen("ceiling_copy_bytes_s", 1e9), "gemm_tflop_s": seen("ceiling_gemm_flop_s", 1e12)}


def distinct(values: Any) -> list[Any]:
    """Different values that are not None, in order of appearance; mappings are compared by content."""
    seen = {json.dumps(value, sort_keys=True): value for value in values if value is not None}
    return list(seen.values())


def partition_facts(proof: dict[str, Any] | None) -> dict[str, Any] | None:
    """One line of `fastcache prove-greenctx`'s record: status, provider, the (main, compress) SMs of each split."""
    if proof is None:
        return None
    granted = [(split["granted_sms"]["main"], split["granted_sms"]["compress"]) for split in proof["splits"]]
    return {
        "status": proof["status"],
        "reason": proof["reason"],
        "provider": proof.get("provider"),
        "granted": [f"{main}/{compress}" for main, compress in granted],
    }


def spread_facts(rows: Sequence[Row]) -> dict[str, Any]:
    """What every caption states: how many cells, how many repeats, how far repeats differ, what failed."""
    measured = [row for row in rows if row["status"] == "ok"]
    spreads = [row["repeats"]["spread"] for row in measured if len(row["repeats"]["values"]) > 1]
    failed = Counter(row["status"] for row in rows if row["status"] != "ok")
    return {
        "cells": len(rows),
        "measured": len(measured),
        "failed": sum(failed.values()),
        "failures": ", ".join(f"{n} {status}" for status, n in failed.most_common()),
        "spread": findings.middle(spreads),
        "largest_spread": max(spreads, default=None),
    }


def quality_facts(quality: Sequence[Row], rows: Sequence[Row], figures: Path) -> dict[str, Any]:
    """What the quality section shows: its rows, the best method per budget, the figure, what it was measured with."""
    found = quality_findings.points(quality, rows)
    return {
        "rows": quality,
        "tasks": list(dict.fromkeys(name for row in quality for name in row["tasks"])),
        "texts": distinct(row["text_source"] for row in quality),
        "dtypes": distinct(row["dtype"] for row in quality),
        "models": distinct(row["model"] for row in quality),
        "best": quality_findings.best_per_budget(found),
        "apart": quality_findings.APART,
        "pictures": quality_findings.pictures(quality),
        "score": next((point["score_name"] for point in found), None),
        "skipped": sorted({t["skipped"] for row in quality for t in row["tasks"].values() if t["skipped"]}),
        "svg": inline_svg(figures / "quality.svg", "quality", "quality against KV bytes and speed"),
        "csv": data_uri(figures / "quality.csv"),
    }


def inline_svg(path: Path, name: str, title: str) -> Markup:
    """The figure's markup, its ids made unique in the page, with a title for those who cannot see it. A narrow one says
    which share of the page it takes, so that its text is no larger than that of others."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    width = re.match(r'<svg[^>]*?\bwidth="([\d.]+)pt"', text)
    share = min(1.0, float(width[1]) / TEXT_POINTS) if width else 1.0
    look = f' style="--share: {share:.3g}"' if share < 1 else ""
    return Markup(
        text.replace("<svg", f'<svg role="img" aria-label="{jinja2.filters.escape(title)}"{look}', 1)
    )


def data_uri(path: Path) -> str:
    return "data:text/csv;base64," + base64.b64encode(path.read_bytes()).decode()


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def templates(folder: Path) -> jinja2.Environment:
    """Undefined names are errors: a report with a hole must not be written."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"times": times, "percent": percent, "number": number, "count": count}
    env.globals |= {
        "middle": findings.middle,
        "kept_share": findings.kept_share,
        "token_match": findings.token_match,
    }
    return env


def context(
    rows: Sequence[Row],
    status: dict[str, Any],
    plan: dict[str, Any],
    figures: Path,
    proof: dict[str, Any] | None = None,
    history: Sequence[Row] = (),
    quality: Sequence[Row] = (),
) -> dict[str, Any]:
    """Everything the templates may name."""
    pairs, facts = findings.comparisons(rows), environment_facts(rows)
    compressing, against = findings.compressing(pairs), deciding.against_fixed(rows)
    return {
        "title": (plan["config"].get("report") or {}).get(
            "title", "Does KV-cache compression pay on this machine?"
        ),
        "headline": deciding.sentence(against) if against and not compressing else findings.headline(rows),
        "dummy": findings.dummy(rows),
        "tiles": deciding.tiles(against) if against and not compressing else findings.tiles(compressing),
        "against": deciding.table(rows, against),
        "pairs": len(pairs),
        "variants": findings.by_variant(rows, plan.get("cells", {})),
        "by_requests": findings.by_requests(rows, pairs),
        "facts": facts,
        "doubts": reproduction.doubts(facts),
        "drifts": reproduction.drifts(rows, history),
        "clocks": reproduction.clocks(rows),
        "partition": partition_facts(proof),
        "spread": spread_facts(rows),
        "discussion": discussion.paragraphs(rows),
        "rows": rows,
        "status": status,
        "excluded": plan["excluded"],
        "config": plan["config"] and json.dumps(plan["config"], indent=2),
        "quality": quality_facts(quality, rows, figures) if quality else None,
        "figures": {
            name: {
                "svg": inline_svg(figures / f"{name}.svg", name, name.replace("_", " ")),
                "csv": data_uri(figures / f"{name}.csv"),
            }
            for name in FIGURES
            if (figures / f"{name}.csv").read_text(encoding="utf-8").strip()  # else nothing was there to draw
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--rows", "--status", "--figures", "--templates", "--output"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--history", type=Path, help="earlier measurements of the same cells")
    parser.add_argument("--quality", type=Path, help="the quality rows; the file may be empty")
    parser.add_argument("--greenctx", type=Path, help="what `fastcache prove-greenctx` wrote")
    args = parser.parse_args()
    lines = args.rows.read_text(encoding="utf-8").splitlines()
    plan = json.loads(args.plan.read_text(encoding="utf-8")) if args.plan else {"config": {}, "excluded": []}
    proof = json.loads(args.greenctx.read_text(encoding="utf-8")) if args.greenctx else None
    status = json.loads(args.status.read_text(encoding="utf-8"))
    kept = args.quality.read_text(encoding="utf-8").splitlines() if args.quality else []
    quality = [json.loads(line) for line in kept]
    page = templates(args.templates).get_template("report.html.j2")
    rows, history = [json.loads(line) for line in lines], reproduction.recall(args.history)
    html = page.render(context(rows, status, plan, args.figures, proof, history, quality))
    part = args.output.with_suffix(".part")
    part.write_text(html, encoding="utf-8")
    os.replace(part, args.output)


if __name__ == "__main__":
    main()
