"""Policies against each other under the same open-loop load, with step costs written down instead of measured.

The costs are about those of Qwen3-8B on an H100 and of SmolLM2 on a CPU core. What is compared is scheduling alone, so
the orderings below hold exactly and every time; how large the gaps are on a device is for the device to say.
"""

from __future__ import annotations

from functools import cache

import pytest
from simulated import Device, Simulation

from fastcache.bench.prompts import Vocabulary
from fastcache.bench.serving.cells import ServingCell
from fastcache.bench.serving.metrics import summarise
from fastcache.bench.serving.workload import plan_arrivals
from fastcache.engine.stages import stage_policy

GPU = Device(step_s=7.5e-3, token_s=24.4e-6, row_s=70e-6, entry_s=0.05e-6, compress_s=2e-6)
CPU = Device(step_s=60e-3, token_s=2.8e-3, row_s=4e-3, entry_s=1e-6, compress_s=20e-6)
LONG = {"context": {"low": 384, "high": 1536, "median": 640, "sigma": 0.4}, "output": {"low": 32, "high": 96}}
SHORT = {"context": {"low": 64, "high": 320, "median": 160, "sigma": 0.4}, "output": {"low": 6, "high": 18}}
STATIC = ("p1c1d8", "p2c2d8", "p3c3d6", "p4c4d8")
PAGE_BYTES = 16 * 147_456


@cache
def row(policy: str, rate: float, release: bool = True, cpu: bool = False) -> dict:
    values = {"model": "qwen3-8b", "load_format": "dummy", "rates": [rate], "slo_tpot_s": 0.05}
    times = {"window_s": 8, "drain_s": 4} if cpu else {"window_s": 4, "drain_s": 2}
    cell = ServingCell.from_dict({**values, **times, "workload": SHORT if cpu else LONG})
    arrivals = plan_arrivals(cell.workload, rate, cell.window_s, cell.seed, Vocabulary(1000, None))
    engine = {"tokens": 256, "max_num_seqs": 32} if cpu else {}
    simulation = Simulation(CPU if cpu else GPU, stage_policy(policy), release=release, **engine)
    recording = simulation.run(arrivals, cell.window_s + cell.drain_s)
    simulation.scheduler.allocator.check()
    assert simulation.scheduler.allocator.used == 0
    return summarise(cell, recording, PAGE_BYTES)


def mean(policy: str, rate: float, what: str, **setting: bool) -> float:
    return row(policy, rate, **setting)[what]["mean"]


@pytest.mark.parametrize("rate", [4, 8, 12, 20, 40, 60])
@pytest.mark.parametrize("other", ["fcfs", *STATIC])
def test_dynamic_is_at_least_as_good_as_any_other_policy(other, rate):
    ours, theirs = row("dynamic", rate), row(other, rate)
    assert ours["output_tok_s"] >= theirs["output_tok_s"]
    assert ours["goodput_requests_s"] >= theirs["goodput_requests_s"]
    assert mean("dynamic", rate, "normalised_latency_s") <= mean(other, rate, "normalised_latency_s")
    # Where little waits, a prompt alone is a few milliseconds faster than one with others' tokens.
    slack = 1.1 if rate < 10 else 1.0
    assert mean("dynamic", rate, "ttft_s") <= slack * mean(other, rate, "ttft_s")


@pytest.mark.parametrize("rate", [0.5, 1, 1.5, 2, 4])
def test_dynamic_does_not_lose_to_fcfs_where_prompts_fill_a_step(rate):
    """A CPU computes each token by itself: riding on a prefill saves it a pass over the weights, no more."""
    assert mean("dynamic", rate, "ttft_s", cpu=True) <= mean("fcfs", rate, "ttft_s", cpu=True)
    assert row("dynamic", rate, cpu=True)["output_tok_s"] >= row("fcfs", rate, cpu=True)["output_tok_s"]


def test_small_fixed_batches_saturate_first():
    best = max(row(policy, rate)["output_tok_s"] for policy in STATIC for rate in (20, 40, 60))
    assert max(row("dynamic", rate)["output_tok_s"] for rate in (40, 60)) > 1.5 * best
    sustained = [p for p in STATIC if row(p, 16)["sustained"]]
    assert min(mean(p, 16, "ttft_s") for p in sustained) > 5 * mean("dynamic", 16, "ttft_s")


@pytest.mark.parametrize("rate", [20, 40])
def test_immediate_release_keeps_a_fifth_less_memory_in_use(rate):
    assert row("dynamic", rate)["mean_kv_bytes"] < 0.8 * row("dynamic", rate, release=False)["mean_kv_bytes"]


def test_time_adds_up_and_every_token_is_delivered():
    for policy in ("dynamic", "p3c3d6"):
        found = row(policy, 8)
        assert found["finished"] == found["requests"] and found["without_first_token"] == 0
        assert sum(found["stage_share"].values()) == pytest.approx(1.0)
