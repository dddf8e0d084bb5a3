"""The sentences of the report: each must be able to say yes, no, and that nothing can be said."""

from __future__ import annotations

import discussion
import findings
import pytest
from make_table import judge
from rows import SMALL_MATRIX, failed_row, row

from fastcache.bench.matrix import expand
from fastcache.bench.table import enrich

CELLS = expand(SMALL_MATRIX | {"batch_sizes": [1], "methods": ["snapkv"]}).cells


def at_speed(factor: float, spread: float = 0.02, repeats: int = 3) -> list[dict]:
    """Rows in which every compressed cell runs at `factor` times its baseline."""
    made = []
    for cell in CELLS:
        speed = 100.0 * (1 if cell.variant == "baseline" else factor)
        values = [speed * (1 - spread / 2), speed, speed * (1 + spread / 2)][:repeats]
        numbers = {"values": values, "median": speed, "spread": spread if repeats > 1 else 0.0}
        made.append(row(cell, throughput_tok_s=speed, repeats=numbers))
    return enrich(made)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (at_speed(1.3), f"Compression pays in speed here: the median throughput is 1.30{findings.TIMES}"),
        (
            at_speed(0.8),
            f"Compression does not pay in speed here: the median throughput is 0.80{findings.TIMES}",
        ),
        (at_speed(1.01), "Compression makes no consistent difference in speed here"),
        (at_speed(1.3, repeats=1), "With a single repeat per cell, speed cannot be told from noise"),
        (enrich([failed_row(cell) for cell in CELLS]), "nothing to conclude"),
    ],
)
def test_the_headline_follows_the_numbers(rows, says):
    assert says in findings.headline(rows)


def test_the_headline_names_the_model_where_there_are_several():
    rows, model = at_speed(1.3), CELLS[0].model
    assert model not in findings.headline(rows)
    other = [each | {"model": "another", "cell_id": "another", "baseline_id": "another"} for each in rows[:1]]
    assert f", {model}, " in findings.headline(rows + other)


def test_variants_stand_in_the_order_that_users_know_and_the_baseline_first():
    rows = at_speed(1.3)
    names = [line["variant"] for line in findings.by_variant(rows)]
    assert names[0] == "baseline" and len(names) > 2
    assert [line["variant"] for line in findings.by_variant(rows[::-1])] == names


def test_a_difference_counts_only_beyond_the_larger_spread():
    assert {pair.verdict for pair in findings.comparisons(at_speed(1.1, spread=0.05))} == {"faster"}
    assert {pair.verdict for pair in findings.comparisons(at_speed(1.1, spread=0.15))} == {"same"}
    assert {pair.verdict for pair in findings.comparisons(at_speed(0.9, spread=0.05))} == {"slower"}


def test_a_pair_needs_numbers_on_both_sides():
    rows = [failed_row(cell) if cell.variant == "baseline" else row(cell) for cell in CELLS]
    assert findings.comparisons(enrich(rows)) == []
    assert discussion.paragraphs(enrich(rows)) == []


def test_the_discussion_does_not_give_as_a_reason_what_did_not_happen():
    rows = at_speed(1.3)
    for each in rows:
        each["tpot_s"] = {"p50": 0.03 if each["method"] is None else 0.036, "p99": 0.04}
    slower = dict(discussion.paragraphs(rows))["Where the time goes"]
    assert f"a shorter cache, and yet a further token takes {discussion.times(1.2)} as long" in slower
    faster = dict(discussion.paragraphs(at_speed(1.3)))["Where the time goes"]
    assert "a shorter cache: a further token" in faster


def test_one_comparison_is_no_range():
    pair = at_speed(1.3)[:2]
    said = dict(discussion.paragraphs(pair))["Speed"]
    assert "range" not in said and said.count(discussion.describe(pair[1], pair)) == 1


def test_the_discussion_counts_what_it_says():
    said = dict(discussion.paragraphs(at_speed(1.3)))
    compared = len(CELLS) - sum(cell.variant == "baseline" for cell in CELLS)
    assert f"Of {compared} comparisons, {compared} are faster" in said["Speed"]
    assert "Batch size" not in said, "there is one batch size, so there is nothing to compare"
    asked = sum(cell.greenctx for cell in CELLS)
    assert f"0 of the {asked} measured cells" in said["Green contexts"]
    assert f"({asked} cells)" in said["Green contexts"]
    assert "the range of their medians, 1.30" in said["Green contexts"]


def test_single_repeats_are_told_from_the_others():
    rows = at_speed(1.3)
    single = {r["cell_id"] for r in rows if r["variant"] == "triad"}
    rows = [
        r | {"repeats": r["repeats"] | {"values": r["repeats"]["values"][:1]}}
        if r["cell_id"] in single
        else r
        for r in rows
    ]
    compared = len(CELLS) - sum(cell.variant == "baseline" for cell in CELLS)
    said = dict(discussion.paragraphs(rows))["Speed"]
    assert f"{len(single)} of {compared} comparisons rest on a single repeat" in said
    rest = compared - len(single)
    assert f"Of {rest} comparisons with repeats, {rest} are faster" in said


def test_decisions_are_compared_with_the_best_fixed_variant_or_said_to_be_missing():
    rows = at_speed(1.3)
    assert "decided nothing by itself" in dict(discussion.paragraphs(rows))["Decisions"]
    for r in rows:
        if r["variant"] in ("auto-tune+greenctx", "triad"):
            r["policy"] = "auto"
    said = dict(discussion.paragraphs(rows))["Decisions"]
    even, half = map(discussion.times, (1.0, 0.5))
    assert (
        f"triad has {even} to {even} its throughput" in said and "where compression-only is fastest" in said
    )
    slow = next(r for r in rows if r["variant"] == "triad")
    slow["throughput_tok_s"] *= 0.5
    said = dict(discussion.paragraphs(rows))["Decisions"]
    assert f"triad has {half} to {even} its throughput" in said
    for r in rows:
        r["policy"] = "auto"
    assert "Decisions" not in dict(discussion.paragraphs(rows))


def test_judge_tells_expected_from_unexpected_and_missing():
    ids = [cell.id for cell in CELLS]
    rows = [
        failed_row(CELLS[0], "oom"),
        failed_row(CELLS[1], "crashed"),
        *(row(cell) for cell in CELLS[2:-1]),
    ]
    allowed = [{"cell": ids[0], "status": "oom"}, {"cell": ids[2], "status": "timeout"}]
    status = judge(rows, ids, allowed)
    assert status["missing"] == [ids[-1]]
    assert [f["cell_id"] for f in status["expected"]] == [ids[0]]
    assert [f["cell_id"] for f in status["unexpected"]] == [ids[1]]
    assert status["unmet_expectations"] == [{"cell": ids[2], "status": "timeout", "ended": ["ok"]}]


def test_a_busy_machine_is_compared_with_nothing():
    rows = at_speed(2.0)
    cell = next(row for row in rows if row["variant"] == "compression-only")
    cell["host_busy"] = True
    kept = findings.comparisons(rows)
    assert all(pair.row is not cell for pair in kept) and len(kept) == len(findings.pairs_of(rows)) - 1
    assert f"1 of {len(kept) + 1} comparisons are left out" in findings.headline(rows)
    for each in rows:
        each["host_busy"] = True
    assert findings.comparisons(rows) == []
    assert "nothing to conclude" in findings.headline(rows) and "left out" in findings.headline(rows)


def test_cells_that_did_the_same_work_are_the_measure_of_noise():
    rows = at_speed(1.2)
    assert all(pair.verdict == "faster" for pair in findings.comparisons(rows))
    twin = next(row for row in rows if row["variant"] == "triad")
    twin["throughput_tok_s"] *= 2
    same = [pair for pair in findings.comparisons(rows) if pair.row["baseline_id"] == twin["baseline_id"]]
    others = [pair for pair in same if pair.row is not twin and pair.row["method"] == twin["method"]]
    assert others and all(pair.verdict == "same" for pair in others)
    for each in rows:
        each["greenctx_available"] = each["greenctx"] or None
    assert all(pair.verdict == "faster" for pair in findings.comparisons(rows))
