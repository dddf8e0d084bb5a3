"""The table of docs/performance.md against the published rows: every number on the page is a row's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    json.loads(line)
    for line in (ROOT / "results/published/h100-engine/speed.jsonl").read_text(encoding="utf-8").splitlines()
]
CELL = re.compile(r"(\d+) x (\d+) \+ (\d+)")


def table(heading: str) -> list[list[str]]:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[part.strip() for part in parts] for parts in lines if CELL.search(parts[0])]


def row_of(label: str, compressed: bool) -> dict:
    batch, context, output = CELL.search(label).groups()
    model = "qwen3-32b" if "32B" in label else "qwen3-8b"
    found = [
        row
        for row in ROWS
        if row["workload"] == f"{batch}x{context}+{output}"
        and row["model"] == model
        and bool(row["compression"]) == compressed
    ]
    assert len(found) == 1, label
    return found[0]


@pytest.mark.parametrize("line", table("Without compression"), ids=lambda line: line[0])
def test_speed_without_compression(line):
    row = row_of(line[0], compressed=False)
    prefill, mfu = line[2].split(", ")
    step, mbu = line[3].split(", ")
    assert line[1] == f"{row['total_tok_s']:,.0f} ({len(row['repeats'])})"
    assert (prefill, mfu) == (f"{row['prefill_tok_s']:,.0f}", f"{row['prefill_mfu']:.2f}")
    assert step == f"{row['decode_ms_step']:.2f}"
    # The first version of the bench took all sequences of two unequal waves for running: no MBU is quoted then.
    assert mbu == (f"{row['decode_mbu']:.2f}" if "144 run at once" not in line[0] else "-")


@pytest.mark.parametrize("line", table("First look at compression"), ids=lambda line: line[0])
def test_speed_with_compression(line):
    full, row = row_of(line[0], compressed=False), row_of(line[0], compressed=True)
    assert line[1:] == [
        f"{full['total_tok_s']:,.0f}",
        f"{row['total_tok_s']:,.0f}",
        f"{row['prefill_tok_s']:,.0f}",
        f"{row['decode_ms_step']:.2f}",
    ]


def test_the_tables_are_found():
    assert len(table("Without compression")) == 9 and len(table("First look at compression")) == 2
