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
    expected = [peers[column] for column in COLUMNS if column in peers]
    expected += [
        ours("h100-engine", "baseline", workload),
        ours("h100-compression", "compression-only", workload),
    ]
    assert [value for value in line[1:] if value != "-"] == [f"{value:,.0f}" for value in expected]
    assert line[1:].count("-") == sum(column not in peers for column in COLUMNS)


def ours(run: str, variant: str, workload: str) -> float:
    batch, context, output = map(int, re.split(r"[x+]", workload))
    shape = ("qwen3-8b", variant, batch, context, output, "bfloat16")
    keys = ("model", "variant", "batch_size", "context_used", "output_used", "kv_dtype")
    (row,) = (
        r
        for r in rows(f"{run}/rows.jsonl")
        if tuple(r[k] for k in keys) == shape and r["cell"]["num_pages"] is None
    )
    return row["throughput_tok_s"]


def test_the_readme_quotes_the_least_and_the_greatest_ratio_to_vllm():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pairs = {"baseline": ("h100-engine", "baseline"), "fp8 KV": ("h100-compression", "compression-only")}
    for theirs, mine in pairs.items():
        ratios = [
            ours(*mine, r["workload"]) / r["total_tok_s"]
            for r in rows("peers/peers.jsonl")
            if (r["system"], r["variant"]) == ("vllm 0.26.0", theirs)
        ]
        assert f"{min(ratios):.2f} to {max(ratios):.2f} times what" in readme


def test_the_table_is_found():
    assert len(table()) == 4
