"""What a matrix will cost: from earlier rows, from counted work at seen rates, or said to be unknown."""

from __future__ import annotations

import json

import pytest
from rows import row

from fastcache.bench.estimate import (
    AROUND_S,
    Estimate,
    duration,
    estimates,
    from_json,
    last_end,
    outlook,
    to_json,
)
from fastcache.bench.matrix import expand
from fastcache.bench.work import kv_entries_read, prefill_flops, step_bytes
from fastcache.models.config import load_model_config

MATRIX = {
    "models": {"smollm2": {"load_format": "dummy"}},
    "workloads": [{"name": "synthetic-long", "context": 256, "output": 33}],
    "variants": ["compression-only"],
    "methods": ["knorm"],
    "compression_factors": [4],
    "batch_sizes": [2],
    "engine": {"device": "cpu", "dtype": "float32"},
    "measure": {"repeats": 3, "warmup": 1},
}


def cells(**changes):
    return expand(MATRIX | changes).cells


def test_a_cell_measured_before_is_told_by_its_row():
    baseline = cells()[0]
    before = row(baseline, elapsed_s=10.0, prompt_tokens=512, prefill_tok_s=128.0, start_to_first_token_s=5.0)
    found = estimates(cells(measure={"repeats": 5, "warmup": 1}), [before])[
        cells(measure={"repeats": 5, "warmup": 1})[0].id
    ]
    # 4 s of prefill and 16 of 33 tokens of the other 6 s; then five times all of it.
    assert found.seconds == pytest.approx(AROUND_S + 5 + 4 + 6 * 16 / 33 + 50)
    assert found.source == "measured before on Example CPU"


def test_a_new_cell_is_counted_at_the_rates_that_rows_have_shown():
    seen = row(cells(batch_sizes=[1])[0], prefill_mfu=0.5, decode_mbu=0.4, start_to_first_token_s=3.0)
    baseline, compressed = cells()
    found = estimates([baseline, compressed], [seen])
    shape = load_model_config("smollm2-135m", "dummy")
    prefill = 2 * prefill_flops(shape, 0, 256) / (0.5 * seen["ceiling_gemm_flop_s"])
    speed = 0.4 * seen["ceiling_copy_bytes_s"]

    def decode(kept: int) -> float:
        request = type("M", (), {"compressed": True, "kv_len_after": kept, "output_tokens": 33})
        entries = 2 * kv_entries_read(request)
        return (32 * step_bytes(shape, "float32") + 2 * 30 * 3 * 64 * 4 * entries) / speed

    for cell, kept in ((baseline, 256), (compressed, 64)):
        warmup = prefill + decode(kept) * 16 / 33
        assert found[cell.id].seconds == pytest.approx(
            AROUND_S + 3 + warmup + 3 * (prefill + decode(kept)), rel=1e-6
        )
        assert found[cell.id].source == "counted work at rates seen on Example CPU"


def test_cells_that_started_no_process_share_the_start_of_the_one_that_did():
    small = cells(batch_sizes=[1])[0]
    first = row(small, start_to_first_token_s=4.0)
    later = row(small, start_to_first_token_s=None, process_cells_before=1)

    def seconds(*seen) -> float:
        return estimates(cells(), list(seen))[cells()[0].id].seconds

    assert seconds(first, later) == pytest.approx(seconds(first) - 2) and seconds(later) == pytest.approx(
        seconds(first) - 4
    )


def test_a_small_pool_means_more_steps():
    seen = row(cells(batch_sizes=[1])[0])
    whole, halved = (
        estimates(cells(engine=MATRIX["engine"] | pool), [seen]) for pool in ({}, {"num_pages": 20})
    )
    assert max(e.seconds for e in halved.values()) > max(e.seconds for e in whole.values())


def test_nothing_is_made_up_where_nothing_is_known():
    found = estimates(cells(), [row(cells()[0], ceiling_copy_bytes_s=None, decode_mbu=None, status="failed")])
    assert set(found.values()) == {None}
    assert str(outlook(found, {})) == "2 cells to measure; no earlier row tells how long they take"
    (first, second) = found
    assert outlook(found, {first: 90.0}).seconds == 90.0
    assert str(outlook(found, {first: 90.0})) == "1 cell to measure, about 2 min"
    assert str(outlook(found, {first: 1.0, second: 1.0})) == "0 cells to measure, about 0 s"


def test_what_is_left_is_corrected_by_what_was_done():
    seen = row(cells(batch_sizes=[1])[0])
    found = estimates(cells(batch_sizes=[1, 2]), [seen])
    first, *rest = found
    slow = {first: 3 * found[first].seconds}
    assert outlook(found, slow).seconds == pytest.approx(3 * sum(found[c].seconds for c in rest))
    assert outlook(found, slow, at_once=4).seconds == pytest.approx(3 * max(found[c].seconds for c in rest))
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def test_the_time_on_several_gpus_is_that_of_the_one_that_ends_last():
    seconds = [50.0, 60.0, 50.5]
    assert [last_end(seconds, gpus) for gpus in (1, 2, 4)] == [160.5, 100.5, 60] and last_end([], 2) == 0
    found = {str(s): Estimate(s, "") for s in seconds}
    assert str(outlook(found, {})) == "3 cells to measure, about 3 min"
    assert str(outlook(found, {}, at_once=2)) == "3 cells to measure, about 2 min on 2 GPUs"


@pytest.mark.parametrize(("seconds", "words"), [(42, "42 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_said_as_people_do(seconds, words):
    assert duration(seconds) == words
