"""What goes wrong in one cell is a row; the others go on, the report is made, and the gate says no at the end."""

from __future__ import annotations

import json

import pytest

FAULTS = {
    "b1-compression-only": "oom",
    "b2-compression-only": "killed",
    "b3-compression-only": "hang",
    "b4-compression-only": "failed",
    "b5-compression-only": "supervisor-killed",
}
STATUS = {1: "oom", 2: "crashed", 3: "timeout", 4: "failed", 5: "crashed"}


@pytest.fixture
def faulty(workplace):
    workplace.configure(batch_sizes=[1, 2, 3, 4, 5], measure={"repeats": 2, "timeout_s": 4})
    return workplace


def test_a_run_says_what_it_costs_and_after_each_cell_what_is_left(workplace, succeed):
    first = succeed(workplace.snakemake())
    assert "Plan: 2 cells to measure, about" in first  # published rows of a CPU show rates
    assert "1 cell to measure, about" in first and "0 cells to measure, about 0 s" in first
    workplace.configure(batch_sizes=[1, 2])
    second = succeed(workplace.snakemake())
    assert "Plan: 2 cells to measure, about" in second and "1 cell to measure, about" in second
    assert "Plan: 0 cells to measure, about 0 s." in succeed(workplace.snakemake("--forcerun", "make_table"))


def test_each_kind_of_failure_is_a_row_and_the_report_shows_it(faulty):
    done = faulty.snakemake(faults=FAULTS)
    assert done.returncode != 0 and "Error in rule gate" in done.stdout
    rows = faulty.rows()
    assert len(rows) == 10
    for row in rows.values():
        expected = "ok" if row["variant"] == "baseline" else STATUS[row["batch_size"]]
        assert row["status"] == expected, row["cell_id"]
        assert (row["throughput_tok_s"] is None) == (expected != "ok")
    status = json.loads((faulty.folder / "results/status.json").read_text())
    assert status["counts"] == {"ok": 5, "oom": 1, "crashed": 2, "timeout": 1, "failed": 1}
    page = (faulty.folder / "results/report.html").read_text()
    assert "5 of 10 cells failed (2 crashed, 1 oom, 1 timeout, 1 failed)" in page
    for row in rows.values():
        if row["status"] != "ok":
            assert row["error"]["message"].split(";")[0].split("`")[0] in page
    assert "injected oom" in page
    assert not (faulty.folder / "results/gate.txt").exists()
    assert (faulty.folder / "results/figures/throughput.svg").read_text().count("timeout") == 1


def test_failures_that_the_config_expects_do_not_fail_the_run(faulty, succeed):
    faulty.configure(
        batch_sizes=[1, 2],
        expected_failures=[
            {"cell": "*-b1-compression-only-*", "status": "oom"},
            {"cell": "*-b2-compression-only-*", "status": "oom"},
        ],
    )
    output = succeed(faulty.snakemake(faults={"b1-compression-only": "oom"}))
    assert "expected oom" in output
    assert "'*-b2-compression-only-*' did not happen (ended ok)" in output
    assert "did not happen" in (faulty.folder / "results/gate.txt").read_text()
    assert "it ended as ok" in (faulty.folder / "results/report.html").read_text()


def test_another_failure_than_the_expected_one_is_not_excused(faulty):
    faulty.configure(expected_failures=[{"cell": "*compression-only*", "status": "oom"}])
    done = faulty.snakemake(faults={"compression-only": "failed"})
    assert done.returncode != 0 and "injected failed" in done.stdout


def test_a_mistake_of_the_user_fails_the_job_and_shows_the_users_message(workplace):
    done = workplace.snakemake(faults={"compression-only": "user-error"})
    assert done.returncode != 0
    assert "compression_factor is 0; allowed is a number above 1." in done.stdout
    assert len(list((workplace.folder / "results/cells").glob("*.json"))) == 1


def test_the_run_succeeds_when_the_cause_is_gone_and_only_the_removed_row_is_measured_again(
    workplace, succeed
):
    assert workplace.snakemake(faults={"compression-only": "oom"}).returncode != 0
    assert len(workplace.measured()) == 2
    failed = next(row["cell_id"] for row in workplace.rows().values() if row["status"] != "ok")
    (workplace.folder / f"results/cells/{failed}.json").unlink()
    succeed(workplace.snakemake())
    assert workplace.measured() == [failed]
