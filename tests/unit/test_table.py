"""The table: speed-ups and agreement only where two measured rows stand side by side."""

from __future__ import annotations

import copy

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from rows import SMALL_MATRIX, failed_row, row, rows_of

from fastcache.bench.matrix import expand
from fastcache.bench.table import agreement, enrich, format_table

VALIDATOR = Draft202012Validator(yaml.safe_load((ROOT / "workflow/schemas/row.schema.yaml").read_text()))
CELLS = expand(SMALL_MATRIX).cells


def pair():
    base = next(c for c in CELLS if c.variant == "baseline")
    other = next(c for c in CELLS if c.variant == "triad" and c.baseline_id == base.id)
    return base, other


def test_every_row_is_compared_with_its_own_baseline():
    rows = rows_of()
    by_id = {r["cell_id"]: r for r in rows}
    for made in enrich(rows):
        base = by_id[made["baseline_id"]]
        assert base["variant"] == "baseline"
        assert (base["model"], base["workload"], base["batch_size"]) == (
            made["model"],
            made["workload"],
            made["batch_size"],
        )
        assert made["speedup_vs_baseline"] == made["throughput_tok_s"] / base["throughput_tok_s"]
        VALIDATOR.validate(made)


def test_a_baseline_agrees_with_itself():
    base, _ = pair()
    made = enrich([row(base)])[0]
    assert made["speedup_vs_baseline"] == 1
    assert made["agreement"]["token_match"] == made["agreement"]["prefix_match"] == 1


@pytest.mark.parametrize("broken", ["base", "other", "absent"])
def test_without_two_measured_rows_there_is_no_comparison(broken):
    base, other = pair()
    rows = {
        "base": [failed_row(base), row(other)],
        "other": [row(base), failed_row(other)],
        "absent": [row(other)],
    }[broken]
    made = enrich(rows)[-1]
    assert made["speedup_vs_baseline"] is None and made["agreement"] is None
    VALIDATOR.validate(made)


def test_the_rows_given_are_not_changed():
    rows = rows_of()
    before = copy.deepcopy(rows)
    enrich(rows)
    assert rows == before


def test_agreement_counts_positions_and_first_differences():
    found = agreement([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]])
    assert found == {
        "requests": 2,
        "token_match": 7 / 8,
        "prefix_match": 5 / 8,
        "median_first_difference": 2.5,
    }


@pytest.mark.parametrize("sample, reference", [([], []), ([[]], [[1]]), ([[1]], [])])
def test_nothing_in_common_is_no_agreement_at_all(sample, reference):
    assert agreement(sample, reference) is None


def test_unequal_lengths_are_compared_where_both_have_tokens():
    assert agreement([[1, 2]], [[1, 2, 3]])["token_match"] == 1


def test_the_printed_table_has_a_line_per_row_and_dashes_for_what_was_not_measured():
    base, other = pair()
    lines = format_table(enrich([row(base), failed_row(other, "timeout")])).splitlines()
    assert len(lines) == 3 and "timeout" in lines[2] and lines[2].count(" -") >= 4
    assert "1.00x" in lines[1] and "snapkv 5x" in lines[2]
    assert len({line.index("english-prose") for line in lines[1:]}) == 1
