"""Metrics: arithmetic that closes, percentiles that are right, and None instead of zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.bench.metrics import Round, percentile, spread, summarise
from fastcache.results import RequestMetrics, RequestOutput
from fastcache.stats import EngineStats


def output(number: int, first: float = 1.0, tokens: int = 5, step: float = 0.1, **changes) -> RequestOutput:
    times = tuple(first + step * i for i in range(tokens))
    values = {
        "arrival_s": 0.5,
        "scheduled_s": 0.6,
        "first_token_s": times[0],
        "finished_s": times[-1],
        "token_times_s": times,
        "prompt_tokens": 100,
        "output_tokens": tokens,
        "cached_tokens": 0,
        "kv_len_before": None,
        "kv_len_after": None,
        "pages_freed": 0,
        "compressed": False,
        "preemptions": 0,
    }
    metrics = RequestMetrics(**(values | changes))
    ids = [number * 1000 + i for i in range(tokens)]
    return RequestOutput(str(number), tuple(range(100)), ids, "", "length", metrics)


def round_(elapsed: float, outputs=None, **stats) -> Round:
    return Round(elapsed, outputs or [output(0), output(1)], EngineStats(**stats))


def test_the_row_describes_the_round_with_the_median_throughput():
    fields = summarise([round_(3.0), round_(1.0), round_(2.0)])
    assert fields["elapsed_s"] == 2.0
    assert fields["total_tokens"] == fields["prompt_tokens"] + fields["output_tokens"] == 210
    assert fields["total_tokens"] / fields["elapsed_s"] == fields["throughput_tok_s"] == 105
    assert fields["repeats"]["values"] == [70, 210, 105]
    assert fields["repeats"]["median"] == 105 and fields["repeats"]["spread"] == pytest.approx(140 / 105)


def test_an_even_number_of_rounds_takes_the_lower_middle_so_that_the_arithmetic_still_closes():
    fields = summarise([round_(1.0), round_(2.0)])
    assert fields["throughput_tok_s"] == fields["repeats"]["median"] == 105


def test_rates_are_of_work_that_was_done():
    fields = summarise(
        [
            round_(
                2.0,
                prefill_tokens=150,
                prefill_time_s=0.5,
                decode_tokens=8,
                decode_time_s=0.25,
                prefix_hit_tokens=50,
            )
        ]
    )
    assert (
        fields["prefill_tok_s"] == 300 and fields["decode_tok_s"] == 32 and fields["prefix_hit_tokens"] == 50
    )


def test_what_did_not_happen_is_none_and_not_zero():
    single = summarise([round_(1.0, [output(0, tokens=1)])])
    assert single["decode_tok_s"] is None and single["tpot_s"] is None and single["prefill_tok_s"] is None
    assert single["kv_len_before"] is None and single["kv_len_after"] is None and single["pages_freed"] == 0


def test_latencies_pool_all_rounds():
    fields = summarise([round_(1.0, [output(0, first=1.0)]), round_(1.0, [output(1, first=2.0)])])
    assert fields["ttft_s"]["p50"] == pytest.approx(1.0) and fields["ttft_s"]["p99"] == pytest.approx(1.49)
    assert fields["tpot_s"]["p50"] == pytest.approx(0.1)


def test_compression_is_told_from_the_requests_it_happened_to():
    done = {"compressed": True, "kv_len_before": 100, "kv_len_after": 20, "pages_freed": 5}
    fields = summarise([round_(1.0, [output(0, **done), output(1)])])
    assert (fields["kv_len_before"], fields["kv_len_after"], fields["pages_freed"]) == (100, 20, 5)
    assert (fields["compressed_requests"], fields["uncompressed_requests"]) == (1, 1)


def test_peaks_are_over_all_rounds_and_the_sample_is_the_first_rounds():
    rounds = [
        round_(1.0, [output(i, tokens=70) for i in range(20)], peak_kv_bytes=7, peak_running=2),
        round_(1.0, [output(99)], peak_kv_bytes=9, peak_running=1),
    ]
    fields = summarise(rounds)
    assert fields["peak_kv_bytes"] == 9 and fields["peak_running"] == 2
    assert len(fields["output_sample"]) == 16 and fields["output_sample"][3] == [3000 + i for i in range(64)]


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentile_is_numpys(values, q):
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9)


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9))
def test_the_spread_is_zero_only_for_equal_values(values):
    made = spread(values)
    assert made["median"] in values and (made["spread"] == 0) == (len(set(values)) == 1)
