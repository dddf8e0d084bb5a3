"""Serving rows through the workflow: planned, judged, drawn and compared, without measuring anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import matplotlib.pyplot as plt
import pytest
import render_serving
import yaml
from conftest import ROOT
from plot_serving import FIGURES
from serving_findings import claims
from serving_rows import sustained_rate, told_apart

from fastcache.bench.row import failure
from fastcache.bench.serving.cells import ServingCell, expand_serving
from fastcache.bench.serving.row import blank_rows

SERVING = {
    "workload": {"context": 40, "output": 4},
    "rates": [2, 8],
    "runs": [
        {"policies": ["dynamic", "p1c1d8"], "methods": ["knorm"], "compression_factors": [4]},
        {"methods": ["full"]},
        {"methods": ["knorm"], "compression_factors": [4], "immediate_release": [False]},
    ],
}
CONFIG = {"models": {"smollm2": {"load_format": "dummy"}}, "serving": SERVING}
FAKE = f"""
import json, sys
sys.path[:0] = {[str(ROOT / "tests/workflow"), str(ROOT / "workflow/scripts")]!r}
from test_serving_page import rows_of
from fastcache.bench.serving.cells import ServingCell
cell = ServingCell.from_dict(json.load(open(sys.argv[1])))
json.dump({{"rows": rows_of(cell), "requests": {{}}}}, open(sys.argv[3], "w"))
"""


def spread(value: float) -> dict[str, float]:
    return {"p50": value, "p90": value, "p99": 2 * value, "mean": value}


def rows_of(cell: ServingCell) -> list[dict]:
    """Measured rows whose numbers follow from the policy, the method and the rate."""
    slow = {"dynamic": 1.0, "p1c1d8": 30.0, "default": 4.0, "triad": 1.0}[cell.scheduled_by] * (
        2.0 if cell.method == "full" else 1.0
    )
    held = 1.0 if cell.immediate_release else 2.0
    state = {"before": 1, "compressed": 2, "whole": 0, "held": 0, "running": 1, "waiting": 0}
    counts = dict.fromkeys(
        ("without_first_token", "preemptions", "too_short_to_compress", "compressed_requests"), 0
    )
    known = {
        "status": "ok",
        "device": {"kind": "cpu", "name": "a test"},
        "weights": {"kind": "dummy", "sha256": None},
        "compressor": None,
        "attention_backend": "torch-sdpa",
        "dtype": "float32",
        "num_pages": 10,
        "max_model_len": 44,
        "elapsed_s": 10.0,
        "host_busy": False,
        "stage_share": {"prefill": 0.3, "mixed": 0.1, "decode": 0.4, "compress": 0.1, "idle": 0.1},
        "pages_over_time": [{"time_s": 0.0, **state}, {"time_s": 5.0, **state}],
        **counts,
    }
    made = []
    for row in blank_rows(cell):
        speed = 100.0 * row["rate"] / slow
        numbers = {
            **dict.fromkeys(("requests", "finished", "prompt_tokens", "output_tokens", "peak_running"), 9),
            **dict.fromkeys(("throughput_tok_s", "output_tok_s", "requests_s", "goodput_requests_s"), speed),
            "slo_attainment": 0.5,
            "ttft_s": spread(0.1 * row["rate"] * slow),
            **{
                name: spread(0.01 * slow)
                for name in ("tpot_s", "token_gap_s", "e2e_s", "normalised_latency_s", "queue_s")
            },
            "sustained": 0.2 * row["rate"] * slow <= 2.0,
            "peak_pages": 5,
            "peak_kv_bytes": 5000,
            "mean_pages": 2.5 * held,
            "mean_kv_bytes": 2500.0 * held,
        }
        made.append(row | known | numbers)
    return made


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    schema = yaml.safe_load((ROOT / "workflow/schemas/serving.schema.yaml").read_text(encoding="utf-8"))
    made = [row for cell in expand_serving(CONFIG) for row in rows_of(cell)]
    for row in made:
        jsonschema.Draft202012Validator(schema).validate(row)
    return made


def test_claims_are_computed_from_the_rows_and_marked(rows):
    found = {claim.what: claim for claim in claims(rows)}
    ttft = found["mean TTFT, p1c1d8 over dynamic"]
    assert ttft.ours == pytest.approx(30) and ttft.verdict == "reached" and "19.3" in ttft.theirs
    assert found["generated tok/s, dynamic over p1c1d8"].ours == pytest.approx(30)
    assert found["share of KV memory in use saved by immediate release"].ours == pytest.approx(0.5)
    assert found["sustained rate, requests per second"].ours == 8.0
    assert found["sustained rate, requests per second"].verdict == "not shown"
    assert found["sustained rate over that of the uncompressed cache"].ours == pytest.approx(4.0)
    static = found["mean TTFT, best static policy over dynamic"]
    assert static.verdict == "not measured" and static.theirs == "", (
        "no rate is sustained by the static policy"
    )


def test_isolation_is_judged_at_the_highest_calm_rate_of_both():
    runs = [{"policies": ["default"], "variants": ["compression-only", "triad"], "methods": ["knorm"]}]
    section = SERVING | {"runs": runs, "rates": [2, 4, 40]}
    made = [row for cell in expand_serving(CONFIG | {"serving": section}) for row in rows_of(cell)]
    for row in made:  # prompts first: overloaded at 40 requests per second, where it does 6
        if row["policy"] == "default":
            row |= {"requests_s": min(row["rate"], 6.0), "sustained": row["rate"] < 40}
    found = {claim.what: claim for claim in claims(made)}
    tpot = found["p99 TPOT, prompts first over triad"]
    assert tpot.ours == pytest.approx(4.0) and tpot.verdict == "reached" and "at 4 requests/s" in tpot.where
    assert found["p99 time between two tokens, prompts first over triad"].ours == pytest.approx(4.0)
    assert found["p99 TTFT, prompts first over triad"].ours == pytest.approx(4.0)
    assert found["throughput, triad over prompts first"].ours == pytest.approx(4.0)
    calm = [row for row in made if row["rate"] < 40]  # without knowing saturation nothing is said
    assert all(claim.verdict == "not measured" for claim in claims(calm))


def test_a_rate_counts_as_sustained_only_if_all_lower_ones_are():
    made = [{"rate": rate, "sustained": ok} for rate, ok in ((4, True), (1, True), (2, False))]
    assert sustained_rate(made) == 1 and sustained_rate([]) is None


def test_serving_alone_ends_in_its_page_and_a_failed_rate_in_a_failed_run(workplace, succeed, monkeypatch):
    fake = workplace.folder / "fake.py"
    fake.write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("FASTCACHE_SERVING_COMMAND", f"{sys.executable} {fake}")
    (workplace.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    succeed(workplace.snakemake())
    page = (workplace.folder / "results/serving.html").read_text(encoding="utf-8")
    assert "up to 19.3 times lower" in page and "our own target" in page and page.count("<svg") == 6
    assert "https://" not in page.replace("http://www.w3.org", "")
    for name in ("latency", "spread", "throughput", "memory", "stages", "pages"):
        table = (workplace.folder / f"results/figures/serving_{name}.csv").read_text(encoding="utf-8")
        assert table.startswith("engine,rate")
    cell = expand_serving(CONFIG)[0]
    file = workplace.folder / f"results/serving/{cell.id}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    none = dict.fromkeys(("ttft_s", "tpot_s", "stage_share", "pages_over_time", "output_tok_s"))
    content["rows"][1] |= none | {"status": "oom", "error": {"type": "OutOfPages", "message": "too small"}}
    file.write_text(json.dumps(content), encoding="utf-8")
    done = workplace.snakemake("--rerun-triggers", "mtime")
    assert done.returncode != 0 and f"OOM {cell.row_id(8.0)}: too small" in done.stdout
    assert "too small" in (workplace.folder / "results/serving.html").read_text(encoding="utf-8")


def test_figures_of_several_workloads_and_of_a_model_that_failed(rows, tmp_path):
    other = {"workload": {**rows[0]["cell"]["workload"], "output": {"low": 8, "high": 9}}}
    longer = [row | {"cell": row["cell"] | other} for row in rows]
    failed = [
        row | failure("oom", "OutOfPages", "too small") | {"model": "large"}
        for row in blank_rows(cell_of(rows[0]))
    ]
    every = told_apart([*rows, *longer, *failed])
    assert {row["model"] for row in every} == {
        "smollm2 (40-40 + 4-4 tokens)",
        "smollm2 (40-40 + 8-9 tokens)",
        "large",
    }
    for given in (every, failed):
        for name, draw in FIGURES.items():
            figure, points = draw(given)
            figure.savefig(tmp_path / f"{name}.svg")
            assert given is failed or set(points["model"]) >= {row["model"] for row in every} - {"large"}
            plt.close(figure)


def cell_of(row: dict) -> ServingCell:
    return ServingCell.from_dict(row["cell"])


def test_a_rate_that_was_slower_than_a_higher_one_is_called_out(rows):
    def said(policy: str, times: float) -> list[str]:
        own = [dict(row) for row in rows if row["policy"] == policy and row["method"] == "knorm"]
        less = min(own, key=lambda row: row["rate"])
        most = max(row["ttft_s"]["p99"] for row in own)
        less["ttft_s"] = less["ttft_s"] | {"p99": times * most}
        return [note for note, row_id in render_serving.slower_than_more(own) if row_id == less["row_id"]]

    assert said("dynamic", 1.5) == [] and "compare nothing at this rate" in said("dynamic", 2.5)[0]
    assert said("p1c1d8", 2.5) == []  # waits for full batches, which come sooner at higher rates


def test_published_serving_rows_are_recognised_and_drawn(workplace, succeed, rows):
    folder = workplace.folder / "results/published/loaded"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    succeed(workplace.snakemake("recorded"))
    assert Path(workplace.folder, "results/recorded/loaded/serving.html").is_file()
