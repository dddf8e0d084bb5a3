"""The graph: which jobs a config means, which targets exist, and what the linters say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import yaml
from config_check import check_config
from conftest import ROOT

from fastcache.bench.matrix import expand
from fastcache.bench.serving.cells import expand_serving


def jobs(output: str) -> dict[str, int]:
    """Rule -> number of jobs, from the statistics of a dry run."""
    counts = re.search(r"^job +count\n-+ +-+\n(.*?)^total", output, re.DOTALL | re.MULTILINE)
    assert counts, output
    return {line.split()[0]: int(line.split()[1]) for line in counts[1].splitlines()}


AROUND_THE_CELLS = {
    **dict.fromkeys(("all", "write_plan", "make_table", "render_report", "gate"), 1),
    **dict.fromkeys(("plot_throughput", "plot_latency", "plot_kv_memory", "plot_agreement"), 1),
    **dict.fromkeys(("plot_timeline", "plot_decisions", "plot_sm_ratio"), 1),
    **dict.fromkeys(("quality_table", "plot_quality"), 1),
    "plot_pools": 1,
}


@pytest.mark.parametrize(
    ("config", "cells", "model"),
    [
        ("config/config.yaml", 36, {"get_smollm2": 1, "verify_greenctx": 1, "measure_quality": 6}),
        ("config/smoke.yaml", 2, {}),
    ],
)
def test_a_shipped_config_means_these_jobs(workplace, succeed, config, cells, model):
    (workplace.folder / "config").mkdir()
    shutil.copy(
        ROOT / "config/config.yaml", workplace.folder / "config"
    )  # a default must not leak into others
    shutil.copy(ROOT / config, workplace.folder / "config.yaml")
    assert jobs(succeed(workplace.snakemake("--dry-run"))) == AROUND_THE_CELLS | model | {
        "measure_cell": cells
    }


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    config = yaml.safe_load(path.read_text())
    cells = check_config(config, ROOT / "workflow/schemas/config.schema.yaml").cells or expand_serving(config)
    assert cells and ("h100" not in path.stem or {c.device for c in cells} == {"cuda"})


def test_a_thousand_cells_are_planned_and_nothing_is_written(workplace, succeed):
    workplace.configure(
        batch_sizes=list(range(1, 101)), compression_factors=[2, 3, 4, 5, 6, 7, 8, 9, 10], methods=["knorm"]
    )
    assert jobs(succeed(workplace.snakemake("--dry-run")))["measure_cell"] == 1000
    assert not (workplace.folder / "results").exists()


def test_one_cell_is_a_target(workplace, succeed):
    cell = expand(yaml.safe_load((workplace.folder / "config.yaml").read_text())).cells[0]
    assert jobs(succeed(workplace.snakemake("--dry-run", f"results/cells/{cell.id}.json"))) == {
        "measure_cell": 1
    }


def test_a_cell_that_is_not_in_the_matrix_is_no_target(workplace):
    done = workplace.snakemake("--dry-run", "results/cells/no-such-cell.json")
    assert done.returncode != 0
    assert "results/cells/no-such-cell.json" in done.stdout and "Traceback" not in done.stdout


def test_the_promised_targets_exist(workplace, succeed):
    listed = succeed(workplace.snakemake("--list-target-rules")).split()
    assert {"all", "figures", "report", "doctor", "recorded"} <= set(listed)


@pytest.mark.parametrize(("target", "missing"), [("figures", "render_report"), ("report", "gate")])
def test_a_smaller_target_leaves_out_what_it_does_not_need(workplace, succeed, target, missing):
    planned = jobs(succeed(workplace.snakemake("--dry-run", target)))
    assert planned["make_table"] == 1 and missing not in planned


def test_a_model_folder_that_is_not_there_is_named_before_any_job(workplace):
    workplace.configure(models={"smollm2": {"path": "no/such/folder"}})
    done = workplace.snakemake("--dry-run")
    assert done.returncode != 0 and "no/such/folder/config.json" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("snakemake", "--snakefile", "Snakefile", "--lint"),
        ("snakefmt", "--check", "Snakefile", "workflow/rules"),
    ],
    ids=["snakemake --lint", "snakefmt"],
)
def test_the_linters_are_content(command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
