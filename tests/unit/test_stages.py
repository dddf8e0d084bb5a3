"""Stage policies are pure functions of the queues; each is pinned by what it must never do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache import LLM
from fastcache.engine.stages import (
    COMPRESS,
    DECODE,
    PREFILL,
    Dynamic,
    FirstComeFirstServed,
    FixedBatches,
    Load,
    Queue,
    Turn,
    stage_policy,
)
from fastcache.errors import UnknownName

queues = st.builds(Queue, pending=st.integers(0, 40), since_s=st.floats(0, 100))
loads = st.builds(
    Load,
    now_s=st.just(100.0),
    prefill=queues,
    compress=queues,
    decode=queues,
    prefill_tokens=st.integers(0, 5000),
)


@given(loads, st.tuples(*[st.integers(1, 9)] * 3))
def test_fixed_batches_never_exceed_their_size_and_never_idle(load, sizes):
    limits = dict(zip((PREFILL, COMPRESS, DECODE), sizes, strict=True))
    turns = FixedBatches(*sizes).turns(load)
    waiting = {stage for stage, queue in load.queues().items() if queue.pending}
    assert {turn.stage for turn in turns} == waiting
    assert all(turn.max_seqs == limits[turn.stage] and not turn.together for turn in turns)


@given(loads, st.tuples(*[st.integers(1, 9)] * 3))
def test_a_batch_that_is_not_full_waits_for_those_that_are(load, sizes):
    limits = dict(zip((PREFILL, COMPRESS, DECODE), sizes, strict=True))
    full = [
        load.queues()[turn.stage].pending >= limits[turn.stage] for turn in FixedBatches(*sizes).turns(load)
    ]
    assert full == sorted(full, reverse=True)


@given(loads)
def test_first_come_first_served_takes_the_oldest(load):
    turns = FirstComeFirstServed().turns(load)
    since = [load.queues()[turn.stage].since_s for turn in turns]
    assert since == sorted(since)


@given(loads)
def test_dynamic_lets_decoding_sequences_ride_on_every_prefill(load):
    for turn in Dynamic().turns(load):
        if turn.stage == PREFILL and load.decode.pending:
            assert turn.together and turn.max_tokens


@given(loads)
def test_dynamic_starts_a_prompt_at_once_where_nothing_decodes_and_names_work_wherever_there_is_some(load):
    stages = [turn.stage for turn in Dynamic().turns(load)]
    assert stages[-1] == DECODE
    assert load.decode.pending or PREFILL in stages
    assert not load.compress.pending or stages[0] == COMPRESS


def test_dynamic_waits_for_company_but_not_for_long():
    policy = Dynamic(enough_tokens=100, patience_s=0.5)
    few = {"compress": Queue(), "decode": Queue(3, 9.9), "prefill_tokens": 99}
    assert policy.turns(Load(10.0, Queue(1, 9.6), **few)) == (Turn(DECODE),)
    assert policy.turns(Load(10.1, Queue(1, 9.6), **few))[0].stage == PREFILL
    assert policy.turns(Load(10.0, Queue(1, 9.6), **{**few, "prefill_tokens": 100}))[0].stage == PREFILL


@pytest.mark.parametrize("name", ["p1c1d8", "p2c2d8", "p3c3d6", "p4c4d8", "p12c3d40"])
def test_static_names_are_read(name):
    policy = stage_policy(name)
    assert f"p{policy.prefill}c{policy.compress}d{policy.decode}" == name


@pytest.mark.parametrize("name", ["static", "p0c1d8", "p1c1", "p1c1d8x", 3])
def test_unknown_policies_are_refused(tiny_model, name):
    with pytest.raises(UnknownName, match="p1c1d8"):
        LLM(tiny_model("llama", 2, 1, 8, 16, 1, False), device="cpu", num_pages=9, policy=name)
