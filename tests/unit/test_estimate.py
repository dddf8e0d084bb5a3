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
    smallest_gpu_gib,
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


ON_GPU = MATRIX | {
    "models": {"qwen3-8b": {"load_format": "dummy"}},
    "workloads": [{"name": "synthetic-long", "context": 3968, "output": 128}],
    "batch_sizes": [256],
    "engine": {"device": "cuda", "dtype": "bfloat16"},
}


def test_a_larger_gpu_than_that_of_the_rows_holds_more_requests_at_once():
    """Qwen3-8B's weights are 15.3 GiB, and a request of 4,096 tokens 0.5625: 100 of them in 72 GiB, 195 in 125."""
    baseline = expand(ON_GPU).cells[0]
    known = row(baseline)["device"] | {"kind": "cuda", "name": "Small GPU", "memory_bytes": 80 * 2**30}
    seen = row(expand(ON_GPU | {"batch_sizes": [1]}).cells[0], device=known)
    copy_s = step_bytes(load_model_config("qwen3-8b", "dummy"), "bfloat16") / (
        seen["decode_mbu"] * seen["ceiling_copy_bytes_s"]
    )

    def waves_less_than_on_the_small_one(memory_gib: float | None) -> float:
        there, here = (estimates([baseline], [seen], m)[baseline.id].seconds for m in (None, memory_gib))
        return (there - here) / (127 * copy_s * (baseline.repeats + baseline.warmup * 3 / 128))

    waves = [waves_less_than_on_the_small_one(m) for m in (None, 80, 139, 300)]
    assert waves == pytest.approx([0, 0, 1, 2])  # of 3, 3, 2 and 1
    assert "rates seen on Small GPU" in estimates([baseline], [seen], 139)[baseline.id].source


def test_the_memory_of_a_gpu_says_nothing_of_a_cpu():
    seen = row(cells(batch_sizes=[1])[0])
    assert estimates(cells(), [seen], 0.001) == estimates(cells(), [seen])


@pytest.mark.parametrize(
    ("said", "memory"), [("143771\n81559\n", 81559 / 1024), ("[N/A]\n", None), ("", None)]
)
def test_the_driver_is_asked_for_the_smallest_gpu(tmp_path, monkeypatch, said, memory):
    monkeypatch.setenv("PATH", str(tmp_path))
    smallest_gpu_gib.cache_clear()
    assert smallest_gpu_gib() is None  # no driver here
    smallest_gpu_gib.cache_clear()
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    tool.chmod(0o755)
    assert smallest_gpu_gib() == memory
    smallest_gpu_gib.cache_clear()


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
