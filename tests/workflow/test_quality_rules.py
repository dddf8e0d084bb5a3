"""Quality cells through the workflow: rows, table, figure, the report's section, failures and resuming."""

from __future__ import annotations

import json
import sys

import pytest
import quality_findings

TASKS = [
    {"name": "continuation", "context": 96, "output": 8, "samples": 2},
    {"name": "greedy", "context": 96, "output": 6, "samples": 2},
    {"name": "needles4", "context": 1000, "samples": 1},
]


def configure(workplace, tiny_model, monkeypatch, methods):
    folder = tiny_model("llama", 4, 2, 16, 64, 2, max_positions=2048)
    monkeypatch.setenv("FASTCACHE_QUALITY_COMMAND", f"{sys.executable} -m fastcache.cli quality")
    workplace.configure(
        models={"tiny": {"path": str(folder)}},
        compression_factors=[2],
        engine={"device": "cpu"},
        quality={"methods": methods, "ratios": [0.5], "tasks": TASKS, "timeout_s": 200},
    )


def test_rows_table_figure_and_section_and_a_failure_is_a_row(workplace, tiny_model, monkeypatch):
    missing = str(workplace.folder / "nothing.json")
    configure(workplace, tiny_model, monkeypatch, ["knorm", {"name": "knorm", "head_budgets": missing}])
    done = workplace.snakemake()
    assert done.returncode != 0 and "Error in rule gate" in done.stdout, done.stdout
    results = workplace.folder / "results"
    rows = [json.loads(line) for line in (results / "quality.jsonl").read_text().splitlines()]
    by_label = {row["label"]: row for row in rows}
    assert list(by_label) == ["full", "full fp8", "no context", "random", "knorm", "knorm head budgets"]
    failed = by_label.pop("knorm head budgets")
    assert failed["status"] == "failed" and missing in failed["error"]["message"]
    assert all(row["status"] == "ok" for row in by_label.values())
    page = (results / "report.html").read_text()
    assert "Quality beside speed" in page and "needles4 is not used" in page and "nothing.json" in page
    assert "The best method for each budget" in page
    assert "compressed. The first rows are guards" in page
    figure = (results / "figures/quality.csv").read_text().splitlines()
    assert len(figure) == 6 and "same likeliest next token" in figure[1]
    knorm = next(line for line in figure if ",knorm," in line)
    assert not knorm.endswith(",")  # the speed cells of the same method and ratio gave it a throughput
    configure(workplace, tiny_model, monkeypatch, ["knorm"])
    again = workplace.snakemake()
    assert again.returncode == 0, again.stdout
    assert "measure_quality" not in again.stdout.split("total")[0], "a row that stands is not measured again"


def row(label, ratio, score, share, guard=False, skipped=None):
    result = {"accuracy": score, "accuracy_se": 0.05, "skipped": skipped}
    return {
        "cell_id": f"{label}{ratio}",
        "model": "m",
        "label": label,
        "method": label,
        "guard": guard,
        "status": "ok",
        "compression_ratio": ratio,
        "kv_dtype": "auto",
        "head_budgets": None,
        "cell": {"method_params": {}},
        "kept": share,
        "kv_bytes_share": share,
        "kv_bytes_per_token": share * 100,
        "tasks": {
            "needles4": result,
            "continuation": {"top1": 0.5, "top1_se": None, "kl": 0.1, "skipped": None},
        },
    }


def best_of(rows):
    return quality_findings.best_per_budget(quality_findings.points(rows))


def test_the_best_method_of_a_budget_is_no_guard_and_is_compared_with_the_whole_cache():
    rows = [
        row("full", None, 0.9, 1.0, guard=True),
        row("random", 0.5, 0.95, 0.5, guard=True),
        row("a", 0.5, 0.7, 0.498),
        row("b", 0.5, 0.8, 0.5),
        row("a", 0.8, 0.2, 0.2),
    ]
    best = best_of(rows)
    assert [(b["budget"], b["label"], b["of"]) for b in best] == [(0.5, "b", 2), (0.2, "a", 1)]
    assert [round(b["loss"], 3) for b in best] == [0.1, 0.7]
    skipped = [
        r | {"tasks": r["tasks"] | {"needles4": r["tasks"]["needles4"] | {"skipped": "no"}}} for r in rows
    ]
    assert {p["score"] for p in quality_findings.points(skipped)} == {0.5}


@pytest.mark.parametrize(
    ("score", "beats"), [(0.7, "yes"), (0.55, "not told apart"), (0.3, "not told apart"), (0.2, "no")]
)
def test_the_best_method_is_held_against_the_best_guard_that_holds_no_more_bytes(score, beats):
    """With errors of 0.05 each, scores are told apart from 0.141 on."""
    guards = [
        row("full", None, 0.9, 1.0, guard=True),
        row("full fp8", None, 0.85, 0.5, guard=True),
        row("random", 0.8, 0.42, 0.198, guard=True),
        row("no context", None, 0.0, 0.0, guard=True),
    ]
    (best,) = best_of([*guards, row("snapkv", 0.8, score, 0.2), row("streaming_llm", 0.8, 0.1, 0.2)])
    assert (best["label"], best["rival"]["label"], best["beats"]) == ("snapkv", "random", beats)
    (merged,) = best_of([*guards, row("mlp", 0.5, 0.9, 0.5)])
    assert (merged["rival"]["label"], merged["beats"]) == ("full fp8", "not told apart")


def test_a_best_method_without_a_guard_or_without_errors_claims_nothing():
    alone = [row("full", None, 0.9, 1.0, guard=True), row("a", 0.5, 0.7, 0.5)]
    assert [(b["rival"], b["beats"]) for b in best_of(alone)] == [(None, None)]
    guard = row("random", 0.5, 0.1, 0.5, guard=True)
    guard["tasks"]["needles4"]["accuracy_se"] = None
    assert [(b["rival"]["label"], b["beats"]) for b in best_of([*alone, guard])] == [("random", None)]
