"""The proof of SM partitions in a run: who waits for it, what it triggers, and what the page says of it."""

from __future__ import annotations

import json
import os

import pytest
import render_report
from conftest import ROOT, Workplace
from rows import SMALL_MATRIX, rows_of
from test_graph import jobs

from fastcache.bench.matrix import expand

PROOF = "results/environment/greenctx.json"


@pytest.fixture
def asking(workplace: Workplace) -> Workplace:
    workplace.configure(variants=["baseline", "greenctx-only"])
    return workplace


def test_only_cells_that_ask_for_a_partition_wait_for_its_proof(asking, succeed) -> None:
    import yaml

    cells = expand(yaml.safe_load((asking.folder / "config.yaml").read_text())).cells
    assert {cell.greenctx for cell in cells} == {True, False}
    for cell in cells:
        planned = jobs(succeed(asking.snakemake("--dry-run", f"results/cells/{cell.id}.json")))
        assert planned == {"measure_cell": 1} | ({"verify_greenctx": 1} if cell.greenctx else {})


def test_a_proof_made_again_is_shown_and_measures_nothing(asking, succeed) -> None:
    succeed(asking.snakemake())
    assert len(asking.measured()) == 2
    proof, page = asking.folder / PROOF, asking.folder / "results/report.html"
    record = json.loads(proof.read_text())
    assert record["status"] in ("unavailable", "proven") and "SM partitions" in page.read_text()
    proof.write_text(json.dumps(record | {"status": "failed", "reason": "the sides share 3 SMs"}))
    os.utime(proof)
    succeed(asking.snakemake())
    assert asking.measured() == [] and "the sides share 3 SMs" in page.read_text()


@pytest.mark.parametrize(
    ("proof", "line"),
    [
        (None, None),
        (
            {"status": "unavailable", "reason": "torch has no CUDA", "splits": []},
            "unavailable: torch has no CUDA",
        ),
        (
            json.loads((ROOT / "results/published/h100-greenctx/greenctx.json").read_text()),
            "proven by sgl_kernel:spatial_ops; main/compression SMs granted: "
            "124/8, 116/16, 104/28, 100/32, 92/40, 80/52, 64/68",
        ),
    ],
    ids=["nobody asks", "no GPU", "H100"],
)
def test_the_page_says_it_in_one_line(proof: dict | None, line: str | None) -> None:
    facts = render_report.environment_facts(rows_of(SMALL_MATRIX))
    section = render_report.templates(ROOT / "report").get_template("sections/setup.html.j2")
    text = section.render(facts=facts, partition=render_report.partition_facts(proof))
    assert ("SM partitions" in text) is (line is not None)
    assert line is None or f"<td>{line}</td>" in text
