"""The side-by-side table of docs/differences-from-the-original.md: every number is a published one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = (
    ("original system", "baseline"),
    ("original system", "best variant"),
    ("vllm 0.26.0", "baseline"),
    ("vllm 0.26.0", "fp8 KV"),
)


def rows(path: str) -> list[dict]:
    lines = (ROOT / "results/published" / path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def table() -> list[list[str]]:
    page = (
        (ROOT / "docs/differences-from-the-original.md")
        .read_text(encoding="utf-8")
        .split("## Side by side")[1]
    )
    lines = [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| \d", line)]
    return [[part.strip() for part in parts] for parts in lines]


@pytest.mark.parametrize("line", table(), ids=lambda line: line[0])
def test_each_number_is_published(line):
    workload = line[0].replace(" ", "")
    peers = {
        (r["system"], r["variant"]): r["total_tok_s"]
        for r in rows("peers/peers.jsonl")
        if r["workload"] == workload
    }
    ours = {bool(r["compression"]): r for r in rows("h100-engine/speed.jsonl") if r["workload"] == workload}
    assert ours[True]["compression"]["method"] == "snapkv"
    expected = [peers[column] for column in COLUMNS] + [ours[False]["total_tok_s"], ours[True]["total_tok_s"]]
    assert line[1:] == [f"{value:,.0f}" for value in expected]


def test_the_table_is_found():
    assert len(table()) == 2
