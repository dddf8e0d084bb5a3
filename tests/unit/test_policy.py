"""The policy is arithmetic on measured costs: what it must never do, and where its break-even point lies."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastcache.engine.averages import Plane, Ratio
from fastcache.engine.policy import (
    BURST,
    CALM,
    GAIN,
    NO_GAIN,
    NOT_MEASURED,
    PLACE_MARGIN,
    TOO_DEAR,
    Costs,
    Limits,
    RequestLoad,
    balance,
    break_even,
    cheapest,
    decide,
)

# An H100 with Qwen3-8B: 147,456 bytes a token, 3 TB/s, about 6 ms for the weights, 29 us a prefilled token.
BYTES = 147_456
H100 = Costs(
    0.006, 1 / 3e12, 2.9e-5, {"inline": 3e-7, "beside:16": 2e-7}, {2048: 0.003, 4096: 0.004, 8192: 0.006}
)
LIMITS = Limits(256, 400_000 * BYTES, BYTES, ("inline", "beside:16"), (2048, 4096, 8192))

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
    """With memory to spare the cost model is linear: e * context = (n - 1) * s."""
    costs, load, limits = situation
    limits = dataclasses.replace(limits, pool_bytes=10**18)
    decision = decide(costs, dataclasses.replace(load, output=2), limits)
    point = break_even(costs, dataclasses.replace(load, output=2), limits, decision.place)
    by_hand = 1 + load.context * costs.exposed[decision.place] / (
        costs.decode_s_per_byte * BYTES * (load.context - load.kept)
    )
    assert point == pytest.approx(by_hand, rel=1e-6)
    assume(2 < point < 10**6)
    for output, pays in ((int(point * 0.99), False), (int(point * 1.01) + 2, True)):
        assert decide(costs, dataclasses.replace(load, output=output), limits).compress == pays


@given(situations(), st.integers(1, 2000))
def test_it_takes_the_cheapest_alternative(situation, output):
    costs, load, limits = situation
    decision = decide(costs, dataclasses.replace(load, output=output), limits)
    chosen = decision.place if decision.compress else "whole"
    margin = PLACE_MARGIN * costs.prefill_s_per_token * load.context
    assert decision.predicted[chosen] <= min(decision.predicted.values()) + margin


def test_the_fixed_place_stays_unless_another_is_clearly_better():
    for other, best in ((0.99 * 3e-7, "inline"), (0.5 * 3e-7, "beside:16")):
        costs = dataclasses.replace(H100, exposed={"inline": 3e-7, "beside:16": other})
        assert cheapest(costs, LIMITS) == best


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


def test_mixed_steps_save_decode_steps_only_where_the_rest_waits_for_them():
    assert balance(H100, LIMITS, pending=60, decoding=4, blocked=False).reason == BURST
    blocked = balance(H100, LIMITS, pending=60, decoding=4, blocked=True)
    assert blocked.together and blocked.chunk == 2048 and blocked.reason == GAIN
    trickle = balance(H100, LIMITS, pending=1, decoding=40, blocked=False)
    assert trickle.together and trickle.reason == GAIN


def test_mixed_steps_that_cost_more_than_they_save_are_not_taken():
    dear = dataclasses.replace(H100, mixed_s={2048: 0.02, 4096: 0.02, 8192: 0.02})
    assert balance(dear, LIMITS, pending=60, decoding=4, blocked=True).reason == NO_GAIN


def test_a_burst_is_mixed_only_if_that_costs_next_to_nothing():
    cheap = dataclasses.replace(H100, mixed_s={2048: 0.003, 4096: 0.001, 8192: 0.001})
    calm = balance(cheap, LIMITS, pending=60, decoding=4, blocked=False)
    assert (calm.together, calm.chunk, calm.reason) == (True, 4096, CALM)


@given(
    st.integers(1, 100),
    st.integers(0, 100),
    st.booleans(),
    st.dictionaries(st.sampled_from([2048, 4096, 999]), seconds),
)
def test_the_balance_stays_within_the_limits(pending, decoding, blocked, mixed):
    chosen = balance(dataclasses.replace(H100, mixed_s=mixed), LIMITS, pending, decoding, blocked)
    assert chosen.together == (chosen.chunk is not None)
    assert chosen.chunk is None or (chosen.chunk in LIMITS.chunks and chosen.chunk in mixed and decoding)


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


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0, 10)), min_size=1, max_size=80))
def test_averages_stay_within_what_was_seen(seen):
    ratio = Ratio()
    for x, y in seen:
        ratio.add(x, y)
    rates = [y / x for x, y in seen]
    assert min(rates) * (1 - 1e-9) <= ratio.value <= max(rates) * (1 + 1e-9) + 1e-30
