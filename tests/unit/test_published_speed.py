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


def test_the_clocks_of_prefill():
    (row,) = (r for r in rows("../h100-sm-sweep/rows.jsonl") if r["variant"] == "baseline")
    power, clock = row["clocks"]["power_w"]["median"], row["clocks"]["sm_mhz"]
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert f"{power:.0f} W and {clock['median']:,.0f} MHz, where the clock can be {clock['max']:,.0f}" in page


def test_the_earlier_version():
    by_use = {bool(r["compression"]): r for r in rows("speed.jsonl") if r["workload"] == "64x3968+128"}
    assert [f"{by_use[on]['prefill_tok_s']:,.0f}" for on in (True, False)] == ["38,868", "41,423"]


def test_the_steps_between_versions():
    """What the page says of the last changes: the same cells of two versions, and of a run between them."""
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")

    def cell(file: str, batch: int, context: int) -> dict:
        found = (r for r in rows(file) if (r["batch_size"], r["context_used"]) == (batch, context))
        return next(r for r in found if r["variant"] == "baseline" and r["model"] == "qwen3-8b")

    first, second, last = "rows-78a3881.jsonl", "rows-4ca0091.jsonl", "rows.jsonl"
    for files, where, field in (
        ((first, "../h100-compression/rows-853ce4b.jsonl"), (64, 3072), "throughput_tok_s"),
        ((first, second), (32, 3968), "prefill_tok_s"),
        ((first, second), (64, 2048), "throughput_tok_s"),
        ((second, last), (32, 3968), "prefill_tok_s"),
        ((second, last), (64, 2048), "throughput_tok_s"),
    ):
        assert " to ".join(f"{cell(file, *where)[field]:,.0f}" for file in files) in page


def test_the_products_of_few_rows():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    found = json.loads((PUBLISHED / "products.json").read_text(encoding="utf-8"))["products"]
    output, gate, down = (
        next(p for p in found if (p["name"], p["rows"]) == (name, 64))
        for name in ("output", "gate and up", "down")
    )
    assert (
        "{ours_us} us where the library takes {library_us} and reading the weights {weights_us}".format(
            **gate
        )
        in page
    )
    ours, theirs = (" and ".join(str(p[who]) for p in (output, down)) for who in ("ours_us", "library_us"))
    assert f"{ours} us where the library takes {theirs}" in page


def test_the_targets_of_the_engine_hold():
    """What vLLM 0.26.0 gave on an H100, and prefill and decode by themselves, with a margin."""
    cells = {
        (r["model"], r["batch_size"], r["context_used"], r["output_used"]): r for r in rows("rows.jsonl")
    }
    least = {
        ("qwen3-8b", 1, 3968, 128): 4200,
        ("qwen3-8b", 32, 3968, 128): 27500,
        ("qwen3-8b", 64, 3968, 128): 30000,
        ("qwen3-8b", 64, 896, 128): 25000,
        ("qwen3-8b", 128, 896, 128): 29500,
        ("qwen3-8b", 64, 3072, 512): 17000,
        ("qwen3-8b", 64, 2048, 1024): 10900,
        ("qwen3-8b", 256, 2048, 512): 18200,
        ("qwen3-32b", 32, 3072, 256): 3350,
    }
    assert cells.keys() == least.keys()
    assert all(cells[key]["throughput_tok_s"] >= least[key] for key in least)
    assert cells["qwen3-8b", 32, 3968, 128]["prefill_tok_s"] >= 42000
    assert 64 / cells["qwen3-8b", 64, 3968, 128]["decode_tok_s"] <= 19.5e-3
    assert all(row["start_to_first_token_s"] <= 20 for row in cells.values())


def test_the_table_is_found():
    assert len(table("Without compression")) == 9
