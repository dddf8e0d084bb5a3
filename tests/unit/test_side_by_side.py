"""When prefill and decode take a side of the SMs each: arithmetic on measured costs, and what is measured."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.config import SamplingParams
from fastcache.core import Chunk, Request, Sequence, Step
from fastcache.engine.balance import (
    BESIDE_GAINS,
    BESIDE_WITHIN,
    GAIN,
    NO_GAIN,
    PROMPTS_FIRST,
    WITHIN,
    Mix,
    balance,
)
from fastcache.engine.policy import Costs, Limits
from fastcache.engine.side_by_side import (
    LATE_STEPS,
    LEAST_TOKENS,
    MOST_TOKENS,
    SIDE_MARGIN,
    gains_s,
    worth_trying,
)
from fastcache.engine.stages import DECODE, PREFILL, Load, Queue
from fastcache.engine.tuner import MOST_TRIALS, TRIED, Tuner

# An H100 with Qwen3-8B, and two splits: prefill 1.65 and 2.4 times as long as alone, decode steps 1.62 and 1.41 times.
PER_TOKEN, FIXED = 2.3e-5, 0.008
SPLITS = ("100+32", "84+48")
H100 = Costs(
    FIXED,
    1 / 3e12,
    PER_TOKEN,
    mixed_s={256: 0.0135, 512: 0.0185, 1024: 0.031},
    aside_s_per_token={"100+32": 1.65 * PER_TOKEN, "84+48": 2.4 * PER_TOKEN},
    beside={"100+32": 1.62, "84+48": 1.41},
)
LIMITS = Limits(64, 10**11, 147_456, chunks=(256, 512, 1024), splits=SPLITS)
MIX = Mix(pending=1, decoding=60, at_once=64, blocked=True, kv_bytes=3e9, prompt_tokens=3000)


def test_for_throughput_a_split_saves_the_decode_steps_done_meanwhile():
    """By hand: 3,000 tokens take 69 ms on the whole GPU and 113.85 ms on 100 SMs, in which 70.28 ms of decode steps are
    done, 60/64 of which counts; then 1.5 steps of 8 ms are late by 0.62 of that."""
    late = LATE_STEPS * 0.62 * FIXED
    by_hand = 3000 * PER_TOKEN * (1 + 60 / 64 * 1.65 / 1.62 - 1.65) - late
    chosen = balance(H100, LIMITS, MIX)
    assert chosen.predicted["100+32"] == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.0136, abs=1e-4)
    assert (chosen.split, chosen.reason, chosen.together, chosen.chunk) == (
        "100+32",
        BESIDE_GAINS,
        False,
        None,
    )
    assert chosen.choice == "side by side, 100+32"
    assert chosen.predicted["84+48"] == pytest.approx(0.0086, abs=1e-4)


def test_mixed_steps_stay_where_they_save_more():
    cheap = dataclasses.replace(H100, mixed_s={256: 0.007, 512: 0.0125, 1024: 0.024})
    chosen = balance(cheap, LIMITS, MIX)
    assert (chosen.together, chosen.reason, chosen.split) == (True, GAIN, None)
    assert set(chosen.predicted) == {256, 512, 1024, *SPLITS}  # the row shows what was turned down


def test_nobody_runs_beside_where_prompts_come_first_or_are_short():
    assert balance(H100, LIMITS, MIX._replace(blocked=False)).reason == PROMPTS_FIRST
    dear = dataclasses.replace(H100, mixed_s={512: 0.1})
    assert balance(dear, LIMITS, MIX._replace(prompt_tokens=LEAST_TOKENS - 1)).reason == NO_GAIN
    assert balance(dear, LIMITS, MIX._replace(prompt_tokens=LEAST_TOKENS)).predicted.keys() >= set(SPLITS)


costs = st.floats(1e-6, 1e-3)
times = st.floats(0.5, 8)


@given(
    st.dictionaries(st.sampled_from(SPLITS), st.tuples(costs, times)),
    st.integers(1, 64),
    st.booleans(),
    st.integers(1, 30_000),
    st.one_of(st.none(), st.floats(0.005, 0.2)),
)
def test_only_measured_splits_and_only_for_a_gain(sides, decoding, blocked, tokens, bound):
    seen = dataclasses.replace(
        H100,
        aside_s_per_token={name: s for name, (s, _) in sides.items()},
        beside={name: t for name, (_, t) in sides.items()},
    )
    mix = MIX._replace(decoding=decoding, blocked=blocked, prompt_tokens=tokens)
    chosen = balance(seen, dataclasses.replace(LIMITS, tpot_s=bound), mix)
    assert (chosen.split is not None) == (chosen.reason in (BESIDE_GAINS, BESIDE_WITHIN))
    if chosen.split is None:
        return
    assert chosen.split in sides and not chosen.together
    if bound is None:
        least = SIDE_MARGIN * min(tokens, MOST_TOKENS) * PER_TOKEN
        assert blocked and chosen.predicted[chosen.split] > least
    else:
        longest = max(v for k, v in chosen.predicted.items() if not isinstance(k, str))
        assert chosen.predicted[chosen.split] <= max(bound, longest)


def test_the_slower_a_side_the_less_it_gains():
    whole = gains_s(H100, 1.0, 2000)["100+32"]
    for slower in (
        {"aside_s_per_token": {"100+32": 1.8 * PER_TOKEN}},
        {"beside": {"100+32": 1.9}},
    ):
        costs = dataclasses.replace(H100, **{"aside_s_per_token": {"100+32": 1.65 * PER_TOKEN}, **slower})
        assert gains_s(costs, 1.0, 2000)["100+32"] < whole
    assert gains_s(H100, 0.5, 2000)["100+32"] < whole


def test_within_a_bound_prompts_go_where_they_are_computed_soonest():
    """900 tokens are done on 100 SMs in 34 ms, noticed a decode step of 14.6 ms later; in mixed steps of 256 tokens
    that last 14.5 ms they would take 72 ms, in steps of 576 tokens that last 15 ms, 30."""
    bounded, few = dataclasses.replace(LIMITS, tpot_s=0.015), MIX._replace(prompt_tokens=900)
    chosen = balance(H100, bounded, few)
    assert (chosen.split, chosen.reason) == ("100+32", BESIDE_WITHIN)
    assert chosen.predicted["100+32"] == pytest.approx(1.62 * 0.009)
    cheap = dataclasses.replace(H100, mixed_s={256: 0.010, 512: 0.0125, 1024: 0.0245})
    assert balance(cheap, bounded, few).reason == WITHIN
    slow = dataclasses.replace(H100, beside={"100+32": 2.6, "84+48": 2.6})
    assert balance(slow, bounded, few).split is None
    assert balance(dataclasses.replace(H100, mixed_s={}), bounded, few).split == "100+32"


def test_prompts_that_one_mixed_step_computes_run_in_it():
    """Its time is that of a full one, which theirs is not."""
    bounded, roomy = dataclasses.replace(LIMITS, tpot_s=0.05), MIX._replace(decoding=8)
    costs = dataclasses.replace(H100, mixed_s={1024: 0.04})
    assert balance(costs, bounded, roomy._replace(prompt_tokens=1016)).together
    assert balance(costs, bounded, roomy._replace(prompt_tokens=1017)).split == "100+32"


def test_what_cannot_be_taken_is_not_worth_trying():
    assert worth_trying(H100, LIMITS, True, 3000) == SPLITS
    assert worth_trying(H100, LIMITS, False, 3000) == ()
    assert worth_trying(H100, dataclasses.replace(LIMITS, tpot_s=0.015), False, 3000) == SPLITS
    assert worth_trying(H100, LIMITS, True, LEAST_TOKENS - 1) == ()
    assert worth_trying(dataclasses.replace(H100, decode_fixed_s=None), LIMITS, True, 3000) == ()


# -- measuring it ------------------------------------------------------------------------------------------------------


def seq(context: int) -> Sequence:
    return Sequence(Request("0", (1,) * context, SamplingParams(max_tokens=9), 0.0))


def prefill(tokens: int, split: str | None) -> Step:
    return Step((Chunk(seq(tokens), 0, 0, tokens, sample=True),), False, split=split)


def decode(split: str | None = None) -> Step:
    return Step(tuple(Chunk(seq(1000), 1000, 1000, 1, sample=True) for _ in range(8)), True, split=split)


@pytest.fixture
def tuner() -> Tuner:
    made = Tuner(Limits(64, 10**12, 1, chunks=(), splits=SPLITS), 1e18)
    for i in range(8):
        tokens = 1000 * (1 + i % 3)
        made.observe(prefill(tokens, None), PER_TOKEN * tokens, 0.0, False)
        made.observe(decode(), FIXED, 0.0, False)
    return made


def load(tokens: int = 3000) -> Load:
    return Load(0.0, Queue(1), Queue(), Queue(60), tokens, blocked=True, at_once=64)


def beside(tuner: Tuner, split: str, tokens: int = 3000) -> None:
    tuner.observe(decode(split), 1.62 * FIXED, 0.0, False)
    tuner.observe(prefill(tokens, split), 1.65 * PER_TOKEN * tokens, 0.0, False)


def test_a_warm_up_tries_each_split_and_the_run_takes_what_gains(tuner):
    tuner.freely, tried = True, []
    for _ in range(2 * MOST_TRIALS):
        turn = tuner.turns(load())[0]
        assert turn.stage == PREFILL and not turn.together
        if tuner._chosen.reason != TRIED:
            break
        tried.append(turn.split)
        assert turn.max_tokens == MOST_TOKENS
        tuner.taken(prefill(3000, turn.split))
        beside(tuner, turn.split)
    assert tried == sorted(tried, key=SPLITS.index) and set(tried) == set(SPLITS)
    tuner.freely = False
    assert tuner.turns(load())[0].split in SPLITS and tuner._chosen.reason == BESIDE_GAINS
    tuner.taken(prefill(3000, tuner._chosen.split))
    report = tuner.report()
    assert report["splits"] == list(SPLITS)
    assert {"side by side, 100+32", "side by side, 84+48"} >= {
        d["choice"] for d in report["decisions"] if d["about"] == "balance"
    }
    assert report["costs"]["beside"] == pytest.approx(dict.fromkeys(SPLITS, 1.62))
    assert report["costs"]["aside_s_per_token"] == pytest.approx(dict.fromkeys(SPLITS, 1.65 * PER_TOKEN))


def test_a_timed_run_tries_no_split(tuner):
    assert tuner.turns(load())[0].split is None


def test_steps_beside_each_other_say_nothing_of_steps_alone(tuner):
    before = tuner.observed.costs
    for _ in range(20):
        beside(tuner, "100+32")
    after = tuner.observed.costs
    assert (after.decode_fixed_s, after.prefill_s_per_token) == (
        before.decode_fixed_s,
        before.prefill_s_per_token,
    )


def test_the_end_of_a_prompt_does_not_price_a_side(tuner):
    for _ in range(6):
        beside(tuner, "100+32", LEAST_TOKENS - 1)
    assert not tuner.observed.costs.beside


def test_decode_steps_follow_what_was_decided(tuner):
    assert [turn.stage for turn in tuner.turns(load())][-1] == DECODE
