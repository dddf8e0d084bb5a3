"""The table of docs/performance.md against the published rows: every number on the page is a row's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results/published/h100-engine"


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in (PUBLISHED / file).read_text(encoding="utf-8").splitlines()]


CELL = re.compile(r"(\d+) x (\d+) \+ (\d+)")


def table(heading: str) -> list[list[str]]:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[part.strip() for part in parts] for parts in lines if CELL.search(parts[0])]


@pytest.mark.parametrize("line", table("Without compression"), ids=lambda line: line[0])
def test_speed_without_compression(line):
    batch, context, output = map(int, CELL.search(line[0]).groups())
    model = "qwen3-32b" if "32B" in line[0] else "qwen3-8b"
    key = (model, batch, context, output)
    (row,) = (
        row
        for row in rows("rows.jsonl")
        if (row["model"], row["batch_size"], row["context_used"], row["output_used"]) == key
    )
    assert line[1:] == [
        f"{row['throughput_tok_s']:,.0f}",
        f"{row['prefill_tok_s']:,.0f}, {row['prefill_mfu']:.2f}",
        f"{row['decode_tok_s']:,.0f}, {row['decode_mbu']:.2f}",
        str(row["peak_running"]),
    ]


@pytest.mark.parametrize("line", table("First look at compression"), ids=lambda line: line[0])
def test_speed_with_compression(line):
    workload = "x".join(CELL.search(line[0]).groups()[:2]) + "+" + CELL.search(line[0])[3]
    full, row = (
        next(r for r in rows("speed.jsonl") if r["workload"] == workload and bool(r["compression"]) == on)
        for on in (False, True)
    )
    assert line[1:] == [
        f"{full['total_tok_s']:,.0f}",
        f"{row['total_tok_s']:,.0f}",
        f"{row['prefill_tok_s']:,.0f}",
        f"{row['decode_ms_step']:.2f}",
    ]


def test_the_tables_are_found():
    assert len(table("Without compression")) == 9 and len(table("First look at compression")) == 2
