"""What the documentation says about pictures is what the published rows say."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "results/published/cpu-shapes/quality.jsonl"
MODEL = ROOT / "results/published/shapes-model"
METHODS = ("mlp", "random", "snapkv", "streaming_llm")


def accuracies() -> dict[tuple[str, float | None], dict]:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    assert all(row["status"] == "ok" and row["tasks"]["shapes"]["skipped"] is None for row in rows)
    own = [row for row in rows if row["kv_dtype"] == "auto"]
    return {(row["method"], row["compression_ratio"]): row for row in own}


def test_the_table_in_the_documentation_is_the_rows():
    rows, text = accuracies(), (ROOT / "docs/shapes.md").read_text(encoding="utf-8")

    def cell(row: dict) -> str:
        task = row["tasks"]["shapes"]
        return f"{task['accuracy']:.1%} ± {task['accuracy_se']:.1%} ({row['kept']:.0%} kept)"

    for method in METHODS:
        line = " | ".join(cell(rows[method, ratio]) for ratio in (0.5, 0.8, 0.9))
        assert f"| `{method}` | {line} |" in text
    for method in ("full", "no_context"):
        task = rows[method, None]["tasks"]["shapes"]
        assert f"{task['accuracy']:.1%} ± {task['accuracy_se']:.1%}" in text


def test_trained_merging_keeps_more_than_what_needs_no_training():
    rows = accuracies()
    for ratio in (0.5, 0.8, 0.9):
        ours = rows["mlp", ratio]["tasks"]["shapes"]
        for method in METHODS[1:]:
            other = rows[method, ratio]["tasks"]["shapes"]
            assert (
                ours["accuracy"] - other["accuracy"]
                > 2 * (ours["accuracy_se"] + other["accuracy_se"]) / 2**0.5
            )


def test_what_is_shipped_is_small_and_says_how_it_came_to_be():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10 * 2**20
    record = json.loads((MODEL / "model/training.json").read_text(encoding="utf-8"))
    said = (ROOT / "docs/shapes.md").read_text(encoding="utf-8")
    assert f"{record['heldout_accuracy']['1']['all']:.1%} of 600" in said
