"""`fastcache compare`: matching by work, the judgement, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from rows import SMALL_MATRIX, failed_row, row, rows_of

from fastcache.bench.compare import compare, format_comparison, load, work_of
from fastcache.bench.matrix import expand
from fastcache.cli import main

CELL = expand(SMALL_MATRIX).cells[0]


def measured(speed: float, spread: float = 0.0, **changes):
    values = [speed * (1 - spread / 2), speed, speed * (1 + spread / 2)]
    repeats = {"values": values, "median": speed, "spread": spread}
    return row(CELL, throughput_tok_s=speed, repeats=repeats, **changes)


@pytest.mark.parametrize(
    ("new", "spread", "verdict"),
    [
        (100, 0.0, "same"),
        (96, 0.0, "same"),
        (94, 0.0, "slower"),
        (94, 0.1, "same"),
        (85, 0.1, "slower"),
        (110, 0.0, "faster"),
        (110, 0.2, "same"),
    ],
)
def test_slower_is_beyond_the_threshold_and_beyond_the_spread(new, spread, verdict):
    (pair,) = compare([measured(100, spread)], [measured(new)], 0.05).pairs
    assert (pair.verdict, pair.ratios["throughput_tok_s"]) == (verdict, pytest.approx(new / 100))
    assert pair.noise == pytest.approx(spread)


@pytest.mark.parametrize(
    ("old", "new", "verdict", "regression"),
    [
        (measured(100), failed_row(CELL), "failed", True),
        (failed_row(CELL), measured(100), "not measured before", False),
        (failed_row(CELL), failed_row(CELL), "failed in both", False),
        (measured(100), measured(50, host_busy=True), "undecided", False),
    ],
)
def test_a_cell_that_failed_or_was_disturbed_is_judged_as_that(old, new, verdict, regression):
    found = compare([old], [new], 0.05)
    assert found.pairs[0].verdict == verdict and bool(found.regressions) == regression


def test_cells_are_matched_by_what_they_compute():
    ours = row(CELL)
    moved = json.loads(json.dumps(ours))
    moved["cell"] |= {"model_path": "elsewhere/SmolLM2", "repeats": 1, "timeout_s": 9.0, "device": "cpu"}
    moved["cell_id"] = "another-id"
    del moved["cell"]["kv_dtype"]  # a row older than the setting
    assert work_of(moved) == work_of(ours)
    for change in (
        {"batch_size": 2},
        {"seed": 3},
        {"num_pages": 40},
        {"kv_dtype": "fp8"},
        {"load_format": "dummy"},
    ):
        other = json.loads(json.dumps(ours))
        other["cell"] |= change
        assert work_of(other) != work_of(ours), change
    stranger = json.loads(json.dumps(ours))
    stranger["cell"]["a key of the future"] = 1
    assert work_of(stranger) == ours["cell_id"]


def test_a_cell_measured_again_is_one_cell_with_more_repeats():
    (pair,) = compare([measured(100), measured(90)], [measured(85)], 0.05).pairs
    assert pair.noise == pytest.approx(10 / 90) and pair.verdict == "same"


def test_the_command_lists_what_only_one_has_and_exits_by_the_verdict(tmp_path, capsys):
    rows = rows_of()
    slow = [r | {"throughput_tok_s": r["throughput_tok_s"] / 2} for r in rows[:3]]
    for r in slow:
        r["repeats"] = {k: v / 2 if k == "median" else v for k, v in r["repeats"].items()}
        r["repeats"]["values"] = [v / 2 for v in r["repeats"]["values"]]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.json"
    a.write_text("".join(json.dumps(r) + "\n" for r in rows[:5]))
    b.write_text(json.dumps(slow + rows[3:4] + rows[8:9]))
    assert main(["compare", str(a), str(a)]) == 0
    assert main(["compare", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert f"only in the old set: {rows[4]['cell_id']}" in out
    assert f"only in the new set: {rows[8]['cell_id']}" in out
    assert "0.500" in out and "; 3 failed, or are slower" in out
    assert main(["compare", str(a), str(b), "--threshold", "0.6"]) == 0


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", ""])
def test_a_file_without_rows_or_without_common_cells_is_a_mistake(tmp_path, capsys, text):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps(row(CELL)))
    bad.write_text(text)
    assert main(["compare", str(good), str(bad)]) == 2
    assert main(["compare", str(tmp_path / "none.jsonl"), str(good)]) == 2
    assert main(["compare", str(good), str(good), "--threshold", "2"]) == 2
    assert "Traceback" not in capsys.readouterr().err


PUBLISHED = sorted(
    path
    for path in ROOT.glob("results/published/*/rows.jsonl")
    if '"row_id"' not in path.read_text().split("\n")[0]
)  # rows of cells, not of request rates


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.parent.name)
def test_published_rows_compare_with_themselves(path: Path):
    rows = load(path)
    found = compare(rows, rows, 0.0)
    assert len(found.pairs) == len({r["cell_id"] for r in rows}) and not found.regressions
    assert (
        not found.only_old and not found.only_new and format_comparison(found).count("\n") == len(found.pairs)
    )
