"""The table of docs/quality.md: every number is a published row's."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "results/published/cpu-quality"
ROWS = [json.loads(line) for line in (FOLDER / "quality.jsonl").read_text(encoding="utf-8").splitlines()]
PAGE = (ROOT / "docs/quality.md").read_text(encoding="utf-8").split("## At factor 5")[1].split("\n## ")[0]


def name(row: dict) -> str:
    label = {"no_context": "no context", "full": "whole cache"}.get(row["method"], row["method"])
    return f"{label}, fp8" if row["kv_dtype"] == "fp8" else label


def test_each_number_is_published():
    table = [
        [part.strip() for part in line.split("|")[1:-1]] for line in PAGE.splitlines() if line[:1] == "|"
    ][2:]
    assert {line[0] for line in table} == {name(row) for row in ROWS} and len(ROWS) == 10
    for row in ROWS:
        (line,) = (line for line in table if line[0] == name(row))
        prose, needles = row["tasks"]["continuation"], row["tasks"]["needles4"]
        assert line[1:] == [
            f"{row['kv_bytes_share']:.3f}",
            f"{prose['perplexity']:.2f}",
            f"{prose['dnll']:.3f} ± {prose['dnll_se']:.3f}",
            f"{prose['kl']:.3f} ± {prose['kl_se']:.3f}",
            f"{needles['accuracy']:.0%} ± {needles['accuracy_se']:.0%}",
        ]


def test_the_rows_are_one_experiment():
    assert len({row["git_commit"] for row in ROWS}) == 1 and all(row["status"] == "ok" for row in ROWS)
