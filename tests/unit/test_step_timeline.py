"""What ran when: runs of steps as the engine notes them, and as a row keeps them."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastcache import LLM, SamplingParams
from fastcache.bench.metrics import step_timeline
from fastcache.stats import GAP_S, MOST_SEGMENTS, EngineStats


def noted(*runs) -> list[tuple]:
    stats = EngineStats()
    for stage, stream, seconds, end_s in runs:
        stats.ran(stage, stream, seconds, end_s)
    return [(s.stage, s.stream, round(s.start_s, 6), round(s.end_s, 6), s.steps) for s in stats.segments]


def test_steps_of_a_kind_that_follow_each_other_are_one_run():
    assert noted(("decode", "main", 0.01, 1.01), ("decode", "main", 0.01, 1.02)) == [
        ("decode", "main", 1.0, 1.02, 2)
    ]
    late = 1.02 + 2 * GAP_S
    apart = noted(("decode", "main", 0.01, 1.01), ("decode", "main", 0.01, late))
    assert [run[4] for run in apart] == [1, 1]
    kinds = noted(
        ("decode", "main", 0.01, 1.01), ("prefill", "main", 0.01, 1.02), ("decode", "main", 0.01, 1.03)
    )
    assert [run[0] for run in kinds] == ["decode", "prefill", "decode"]


def test_a_stream_runs_one_thing_at_a_time_and_streams_run_beside_each_other():
    """The host notices an end late, so a step's own seconds may reach back into the one before."""
    runs = noted(
        ("prefill", "main", 0.5, 1.5), ("compress", "compress", 0.3, 1.5), ("decode", "main", 0.2, 1.6)
    )
    assert runs == [
        ("prefill", "main", 1.0, 1.5, 1),
        ("compress", "compress", 1.2, 1.5, 1),
        ("decode", "main", 1.5, 1.6, 1),
    ]


def test_the_beginning_of_a_long_run_is_kept():
    kinds = itertools.cycle(("prefill", "decode"))
    runs = noted(*((next(kinds), "main", 0.01, 0.01 * i) for i in range(1, 2 * MOST_SEGMENTS)))
    assert len(runs) == MOST_SEGMENTS and runs[-1][3] == pytest.approx(0.01 * MOST_SEGMENTS)


@pytest.mark.parametrize("policy", ["default", "p1c1d8", "dynamic"])
def test_an_engine_notes_every_kind_of_step_it_runs(tiny_model, policy):
    folder = tiny_model("llama", 4, 2, 16, 48, 3, False)
    compression = {"method": "knorm", "compression_ratio": 0.6}
    llm = LLM(folder, device="cpu", page_size=4, num_pages=200, policy=policy, compression=compression)
    generator = torch.Generator().manual_seed(0)
    for length in (60, 50, 70):
        prompt = torch.randint(0, 256, (length,), generator=generator).tolist()
        llm.add_request(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        llm.step()
    while llm.has_unfinished():
        llm.step()
    stats = llm.stats()
    seconds = {"prefill": 0.0, "mixed": 0.0, "decode": 0.0, "compress": 0.0}
    steps = dict.fromkeys(seconds, 0)
    for segment in stats.segments:
        seconds[segment.stage] += segment.end_s - segment.start_s
        steps[segment.stage] += segment.steps
    for kind, count in steps.items():
        assert count == getattr(stats, f"{kind}_steps"), kind
        assert seconds[kind] >= 0.5 * getattr(stats, f"{kind}_time_s")
    row = step_timeline(stats.segments, stats.kv)
    assert len({len(column) for column in row.values()}) == 1
    assert all(0 <= a <= b for a, b in zip(row["start_s"], row["end_s"], strict=True))
    assert step_timeline([], stats.kv) is None
