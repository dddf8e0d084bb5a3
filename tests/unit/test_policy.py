"""The policy is arithmetic on measured costs: what it must never do, and where its break-even point lies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastcache.engine.averages import Middle, Plane, Ratio
from fastcache.engine.balance import (
    BACKLOG,
    GAIN,
    NEARLY,
    NO_GAIN,
    PROMPTS_FIRST,
    TIGHT,
    WITHIN,
    Mix,
    balance,
    worth_trying,
)
from fastcache.engine.policy import (
    NOT_MEASURED,
    PAYS_MARGIN,
    PLACE_MARGIN,
    TOO_DEAR,
    TOO_LITTLE,
    Costs,
    Limits,
    RequestLoad,
    break_even,
    cheapest,
    decide,
)

# An H100 with Qwen3-8B: 147,456 bytes a token, 3 TB/s, about 6 ms for the weights, 29 us a prefilled token.
BYTES = 147_456
CHUNKS = (2048, 4096, 8192)
H100 = Costs(
    0.006, 1 / 3e12, 2.9e-5, {"inline": 3e-7, "beside:16": 2e-7}, {2048: 0.0624, 4096: 0.1228, 8192: 0.2436}
)
LIMITS = Limits(256, 400_000 * BYTES, BYTES, ("inline", "beside:16"), CHUNKS)

granted = st.lists(st.integers(1, 15).map(lambda n: f"beside:{8 * n}"), unique=True, max_size=4)
seconds = st.floats(1e-9, 1e-3)


@st.composite
def situations(draw):
    places = ("inline", *draw(granted))
    exposed = {place: draw(seconds) for place in places}
    costs = Costs(draw(st.floats(1e-4, 0.1)), draw(st.floats(1e-13, 1e-9)), 1e-5, exposed)
    context = draw(st.integers(2, 8000))
    load = RequestLoad(
        context, draw(st.integers(1, context - 1)), draw(st.integers(0, 500)), 1, draw(st.integers(1, 300))
    )
    limits = Limits(draw(st.integers(1, 256)), draw(st.integers(20_000, 10**6)) * BYTES, BYTES, places)
    return costs, load, limits


@given(situations(), st.integers(1, 4000))
def test_only_places_that_were_granted(situation, output):
    costs, load, limits = situation
    wider = dataclasses.replace(costs, exposed={**costs.exposed, "beside:132": 0.0})
    decision = decide(wider, dataclasses.replace(load, output=output), limits)
    assert decision.place in limits.places
    assert set(decision.predicted) <= {"whole", *limits.places}


@given(situations(), st.integers(1, 3000), st.integers(1, 3000))
def test_longer_outputs_never_turn_compression_off(situation, one, other):
    costs, load, limits = situation
    short, long = sorted((one, other))
    if decide(costs, dataclasses.replace(load, output=short), limits).compress:
        assert decide(costs, dataclasses.replace(load, output=long), limits).compress


@given(situations())
def test_it_compresses_beyond_the_break_even_point_and_not_before(situation):
    """With memory to spare the cost model is linear: (e + margin) * context = (n - 1) * s."""
    costs, load, limits = situation
    limits = dataclasses.replace(limits, pool_bytes=10**18)
    decision = decide(costs, dataclasses.replace(load, output=2), limits)
    point = break_even(costs, dataclasses.replace(load, output=2), limits, decision.place)
    price = costs.exposed[decision.place] + PAYS_MARGIN * costs.prefill_s_per_token
    by_hand = 1 + load.context * price / (costs.decode_s_per_byte * BYTES * (load.context - load.kept))
    assert point == pytest.approx(by_hand, rel=1e-6)
    assume(2 < point < 10**6)
    for output, pays in ((int(point * 0.99), False), (int(point * 1.01) + 2, True)):
        assert decide(costs, dataclasses.replace(load, output=output), limits).compress == pays


@given(situations(), st.integers(1, 2000))
def test_it_takes_the_cheapest_alternative(situation, output):
    costs, load, limits = situation
    decision = decide(costs, dataclasses.replace(load, output=output), limits)
    chosen = decision.place if decision.compress else "whole"
    margin = max(PLACE_MARGIN, PAYS_MARGIN) * costs.prefill_s_per_token * load.context
    assert decision.predicted[chosen] <= min(decision.predicted.values()) + margin


def test_the_fixed_place_stays_unless_another_is_clearly_better():
    for other, best in ((0.5 * 3e-7, "inline"), (0.0, "beside:16")):
        costs = dataclasses.replace(H100, exposed={"inline": 3e-7, "beside:16": other})
        assert cheapest(costs, LIMITS, 8_000) == best


def test_a_place_seen_in_small_steps_alone_is_not_taken_for_large_ones():
    costs = dataclasses.replace(
        H100, exposed={"inline": 3e-7, "beside:16": 0.0}, seen_tokens={"inline": 2_000, "beside:16": 2_000}
    )
    places = [cheapest(costs, LIMITS, tokens) for tokens in (500, 2_666, 2_667, 30_000)]
    assert places == ["beside:16", "beside:16", "inline", "inline"]


def test_nothing_is_decided_before_it_is_measured():
    load = RequestLoad(3968, 794, 0, 2, 64)
    for unknown in ({"decode_fixed_s": None}, {"decode_s_per_byte": None}, {"exposed": {}}):
        decision = decide(dataclasses.replace(H100, **unknown), load, LIMITS)
        assert decision.compress and decision.place == "inline" and decision.reason == NOT_MEASURED


def test_short_outputs_on_an_h100_are_left_whole():
    short = decide(H100, RequestLoad(1024, 205, 0, 4, 64), LIMITS)
    assert not short.compress and short.reason == TOO_DEAR
    assert decide(H100, RequestLoad(3968, 794, 0, 128, 64), LIMITS).compress


def test_a_full_pool_makes_compression_pay_earlier():
    load = RequestLoad(3968, 794, 0, 20, 256)
    ample = break_even(H100, load, dataclasses.replace(LIMITS, pool_bytes=10**18), "inline")
    assert break_even(H100, load, LIMITS, "inline") < ample


def mix(pending=1, decoding=60, at_once=64, blocked=True, kv_bytes=8e9) -> Mix:
    return Mix(pending, decoding, at_once, blocked, kv_bytes)


def test_a_mixed_step_takes_the_place_of_a_prefill_and_of_its_share_of_a_decode_step():
    """By hand: 6 ms x 60/64 of a decode step, and 29.2 us for each token of a prompt, compressed where that is
    cheapest; 60 tokens of the step are decoding rows."""
    costs = dataclasses.replace(H100, mixed_s={2048: 0.0606, 4096: 0.1212, 8192: 0.2413})
    chosen = balance(costs, LIMITS, mix())
    share = 0.006 * 60 / 64
    by_hand = {chunk: share + 2.92e-5 * (chunk - 60) - whole for chunk, whole in costs.mixed_s.items()}
    assert chosen.predicted == pytest.approx(by_hand)
    assert (chosen.together, chosen.chunk, chosen.reason) == (True, 2048, GAIN)


def test_prompts_go_first_unless_requests_wait_for_decode_steps():
    assert balance(H100, LIMITS, mix(blocked=False)).reason == PROMPTS_FIRST
    few = balance(H100, LIMITS, mix(pending=60, decoding=4))
    assert (
        not few.together and few.reason == NO_GAIN
    )  # four of 64 rows: a sixteenth of a decode step is saved
    dear = dataclasses.replace(H100, mixed_s={2048: 0.08, 4096: 0.14, 8192: 0.26})
    assert balance(dear, LIMITS, mix()).reason == NO_GAIN


def whole_steps(overheads):
    return {chunk: 2.9e-5 * chunk + overhead for chunk, overhead in overheads.items()}


@given(
    st.integers(1, 300), st.integers(1, 256), st.booleans(), st.dictionaries(st.sampled_from(CHUNKS), seconds)
)
def test_mixed_steps_for_throughput_are_only_taken_where_a_gain_is_predicted(
    pending, decoding, blocked, mixed
):
    costs = dataclasses.replace(H100, mixed_s=whole_steps(mixed))
    what = mix(pending, decoding, min(256, pending + decoding), blocked)
    chosen = balance(costs, LIMITS, what)
    assert chosen.together == (chosen.reason == GAIN) == (chosen.chunk is not None)
    if chosen.together:
        apart = H100.decode_fixed_s + (2.9e-5 + 2e-7) * (chosen.chunk - decoding)
        assert blocked and 0 < chosen.predicted[chosen.chunk] <= apart - costs.mixed_s[chosen.chunk] + 1e-12


@given(st.integers(1, 300), st.integers(1, 256), st.booleans(), st.floats(0.005, 0.5))
def test_only_what_could_pay_is_worth_trying(pending, decoding, blocked, bound):
    what = mix(pending, decoding, min(256, pending + decoding), blocked)
    per_token = H100.prefill_s_per_token
    free = dataclasses.replace(H100, mixed_s={chunk: per_token * chunk for chunk in CHUNKS[1:2]})
    unknown = dataclasses.replace(H100, mixed_s={})
    assert bool(worth_trying(unknown, LIMITS, what)) == balance(free, LIMITS, what).together
    assert worth_trying(unknown, LIMITS, what) in ((), CHUNKS[1:2])  # one is tried first
    assert worth_trying(free, LIMITS, what) in ((), CHUNKS[:2])  # larger ones save less for each prompt token
    bounded = dataclasses.replace(LIMITS, tpot_s=bound)
    assert worth_trying(unknown, bounded, what) == CHUNKS[:1]
    tried = worth_trying(H100, bounded, what)
    chosen = balance(H100, bounded, what)
    assert tried and tried == CHUNKS[: len(tried)]
    assert chosen.reason in (TIGHT, BACKLOG) or chosen.chunk <= tried[-1]


def nearly_as_fast_as_any(chosen, decoding=60):
    rates = {chunk: (chunk - decoding) / seconds for chunk, seconds in chosen.predicted.items()}
    smaller = [rate for chunk, rate in rates.items() if chunk < chosen.chunk]
    least = NEARLY * max(rates.values())
    return rates[chosen.chunk] >= least and all(rate < least for rate in smaller)


def test_many_waiting_prompts_come_before_the_bound():
    """Within the bound a step has 3,072 tokens; the more steps of that size the prompts would take, the longer."""
    costs = dataclasses.replace(H100, mixed_s={2048: 0.12, 4096: 0.13, 8192: 0.3})
    limits = dataclasses.replace(LIMITS, tpot_s=0.125)
    few = mix(decoding=1, blocked=False, kv_bytes=0.0)._replace(prompt_tokens=10_000)
    more, many = few._replace(prompt_tokens=40_000), few._replace(prompt_tokens=64_000)
    chosen = [balance(costs, limits, each) for each in (few, more, many)]
    assert [each.reason for each in chosen] == [WITHIN, BACKLOG, BACKLOG]
    assert [each.chunk for each in chosen] == [3072, 6976, 8192]
    assert (
        np.interp(6976, (4096, 8192), (0.13, 0.3)) <= 2 * 0.125 <= np.interp(7040, (4096, 8192), (0.13, 0.3))
    )
    assert worth_trying(costs, limits, few._replace(prompt_tokens=8_000)) == CHUNKS[:2]
    assert worth_trying(costs, limits, many) == CHUNKS


def test_what_gives_back_too_little_to_be_measured_is_left_whole():
    """512 tokens that four are generated from: 0.2 ms of a prefill that takes 15."""
    costs = dataclasses.replace(H100, exposed={"inline": 0.0})
    decision = decide(costs, RequestLoad(512, 102, 0, 4, 64), LIMITS)
    assert not decision.compress and decision.reason == TOO_LITTLE
    assert 4 < decision.break_even < 20


@given(
    st.floats(0, 3e10),
    st.floats(0.005, 0.5),
    st.dictionaries(st.sampled_from(CHUNKS), st.floats(0, 0.02), min_size=1),
)
def test_a_step_lasts_as_long_as_the_bound_allows_and_no_longer(kv_bytes, bound, mixed):
    costs = dataclasses.replace(H100, mixed_s=whole_steps(mixed))
    chosen = balance(costs, dataclasses.replace(LIMITS, tpot_s=bound), mix(blocked=False, kv_bytes=kv_bytes))
    assert chosen.together and min(mixed) <= chosen.chunk <= max(mixed)
    if chosen.reason == TIGHT:
        assert all(seconds > bound for seconds in chosen.predicted.values())
        assert nearly_as_fast_as_any(chosen)
        return
    assert chosen.reason == WITHIN
    sizes = sorted(chosen.predicted)

    def lasts(chunk):
        return float(np.interp(chunk, sizes, [chosen.predicted[each] for each in sizes]))

    assert lasts(chosen.chunk) <= bound * (1 + 1e-9)
    if chosen.chunk < sizes[-1]:  # a larger one would break the bound
        assert lasts(chosen.chunk + 64) > bound * (1 - 1e-9)


@given(st.dictionaries(st.sampled_from(CHUNKS), st.floats(-1, 0.001), min_size=1), st.integers(1, 9000))
def test_steps_that_seem_to_take_no_time_are_decided_about_too(mixed, decoding):
    """As in a tiny model, whose KV bytes were measured to cost more than whole steps."""
    costs, limits = dataclasses.replace(H100, mixed_s=mixed), dataclasses.replace(LIMITS, tpot_s=0.01)
    chosen = balance(costs, limits, mix(decoding=decoding, kv_bytes=0.0))
    assert chosen.chunk in CHUNKS or chosen.chunk % 64 == 0 if chosen.together else not chosen.predicted


@given(st.floats(0.01, 0.2), st.floats(0.01, 0.2))
def test_a_tighter_bound_never_makes_a_larger_step(one, other):
    tight, loose = sorted((one, other))
    chunks = [
        balance(H100, dataclasses.replace(LIMITS, tpot_s=bound), mix()).chunk for bound in (tight, loose)
    ]
    assert chunks[0] <= chunks[1]


def test_a_plane_is_recovered_from_steps_that_differ():
    plane = Plane()
    for step in range(60):
        kv = 1e9 * (1 + step % 7)
        plane.add(1.0, kv, 0.005 + kv * 3e-13)
    fixed, per_byte = plane.solve()
    assert fixed == pytest.approx(0.005, rel=0.01) and per_byte == pytest.approx(3e-13, rel=0.01)


def test_where_steps_do_not_differ_the_physical_bound_decides():
    plane = Plane(3e-13)
    for _ in range(60):
        plane.add(1.0, 1e9, 0.005)
    fixed, per_byte = plane.solve()
    assert per_byte >= 3e-13 and fixed + per_byte * 1e9 == pytest.approx(0.005)


def test_one_spoilt_observation_of_three_does_not_count():
    middle = Middle()
    for seconds_taken in (0.002, 0.4, 0.003):
        middle.add(1.0, seconds_taken)
    assert middle.value == 0.003


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0, 10)), min_size=1, max_size=80))
def test_averages_stay_within_what_was_seen(seen):
    ratio = Ratio()
    for x, y in seen:
        ratio.add(x, y)
    rates = [y / x for x, y in seen]
    assert min(rates) * (1 - 1e-9) <= ratio.value <= max(rates) * (1 + 1e-9) + 1e-30
