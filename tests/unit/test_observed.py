"""What steps are observed to take becomes costs: whose delay is whose, and what says nothing."""

from __future__ import annotations

import pytest

from fastcache.config import SamplingParams
from fastcache.core import Chunk, Request, Sequence, Step
from fastcache.engine.observed import Observed
from fastcache.engine.policy import Limits
from fastcache.engine.stages import Load, Queue
from fastcache.engine.tuner import CHEAPEST, FIXED_IS_BEST, NOT_SEEN, Tuner

PER_TOKEN, FIXED = 2e-5, 0.006


def seq(context: int = 1000) -> Sequence:
    return Sequence(Request("0", (1,) * context, SamplingParams(max_tokens=9), 0.0))


def prefill(tokens: int, place: str, kept: int = 0) -> Step:
    return Step((Chunk(seq(tokens), 0, 0, tokens, sample=True, kept=kept),), decode=False, place=place)


def decode(rows: int = 8) -> Step:
    return Step(tuple(Chunk(seq(), 1000, 1000, 1, sample=True) for _ in range(rows)), decode=True)


@pytest.fixture
def observed() -> Observed:
    made = Observed(Limits(64, 10**12, 1, ("inline", "after:16")), 1e18)
    for i in range(8):
        tokens = 1000 * (1 + i % 3)
        made.observe(prefill(tokens, "inline", kept=200), PER_TOKEN * tokens + 0.001, 0.001, False)
        made.observe(decode(), FIXED, 0.0, False)
    return made


def test_a_compression_beside_a_prefill_is_charged_with_what_that_took_longer(observed):
    """It ends while the prefill is still running: that step's time is learned afterwards."""
    for _ in range(3):
        observed.observe(prefill(2000, "after:16"), PER_TOKEN * 2000, 0.0, False)
        observed.job_done(2000)
        observed.observe(prefill(3000, "after:16"), PER_TOKEN * 3000 + 0.01, 0.0, False)
    costs = observed.costs
    assert costs.exposed["after:16"] == pytest.approx(0.01 / 2000, rel=0.05)
    assert costs.prefill_s_per_token == pytest.approx(PER_TOKEN, rel=0.01)  # not spoilt by those steps


def test_decode_steps_and_waiting_are_charged_too(observed):
    for _ in range(3):
        observed.observe(decode(), FIXED + 0.002, 0.0, True)
        observed.waited(0.003)
        observed.job_done(1000)
        observed.observe(decode(), FIXED + 0.001, 0.0, False)
    assert observed.costs.exposed["after:16"] == pytest.approx(0.006 / 1000, rel=0.05)
    assert observed.costs.decode_fixed_s == pytest.approx(FIXED, rel=0.01)


def test_a_step_that_the_host_held_up_says_nothing(observed):
    before = observed.costs
    observed.observe(decode(), 1.0, 0.0, False)
    assert observed.costs == before


@pytest.mark.parametrize("freely", [True, False])
@pytest.mark.parametrize(("after_s", "wanted"), [(6e-6, "beside:32"), (1e-7, "after:32")])
def test_where_a_split_binds_both_of_its_places_are_priced_before_one_is_chosen(after_s, wanted, freely):
    """What runs beside a prefill cannot be told from it until one was seen alone, as it is where compression comes
    after. As many rounds as a benchmark's warm-up has."""
    tuner = Tuner(Limits(64, 10**12, 1, ("beside:32", "after:32")), 1e18)
    tuner.freely = freely
    tokens, beside_s = 2000, 2e-6
    for _ in range(10):
        place = tuner.place()
        later = place == "after:32"
        chunk = Chunk(seq(tokens), 0, 0, tokens, sample=True, kept=0 if later else 400, defer=later)
        step = Step((chunk,), decode=False, place=place)
        tuner.taken(step)
        tuner.observe(step, tokens * (PER_TOKEN if later else PER_TOKEN + beside_s), 0.0, False)
        if later:
            tuner.observed.waited(tokens * after_s)
            tuner.observed.job_done(tokens)
        for _ in range(4):
            tuner.observe(decode(), FIXED, 0.0, False)
    assert tuner.measured
    assert tuner.observed.costs.exposed == pytest.approx(
        {"beside:32": beside_s, "after:32": after_s}, rel=0.05
    )
    assert tuner._place() == (wanted, FIXED_IS_BEST if wanted == "beside:32" else CHEAPEST)


def test_beside_a_prefill_is_priced_by_steps_of_the_same_size():
    """Small prefills are slow for reasons of their own, here 20 ms of them; a difference to what their tokens take in
    larger ones would be that, and one to a mean of both could be nothing at all."""
    observed = Observed(Limits(64, 10**12, 1, ("inline", "beside:32")), 1e18)
    for tokens, own_s in [(30_000, 0.0)] * 5 + [(2_000, 0.02)] * 3:
        whole = PER_TOKEN * tokens + own_s
        observed.observe(prefill(tokens, "inline", kept=200), whole + 1e-6 * tokens, 1e-6 * tokens, False)
    for _ in range(3):
        observed.observe(prefill(2_000, "beside:32", kept=200), PER_TOKEN * 2_000 + 0.02 + 0.006, 0.0, False)
        observed.observe(prefill(1_900, "beside:32", kept=200), 1.0, 0.0, False)  # like no other step
    assert observed.costs.exposed == pytest.approx({"inline": 1e-6, "beside:32": 3e-6})


def test_compression_in_a_small_step_does_not_price_that_in_large_ones(observed):
    """Whose launches the device waits for. Many small ones are needed to outweigh a few large ones."""
    for _ in range(12):
        observed.observe(prefill(100, "inline", kept=50), PER_TOKEN * 100 + 0.002, 0.002, False)
    assert observed.costs.exposed["inline"] == pytest.approx(0.001 / 2000, rel=0.6)


def test_a_place_is_taken_for_steps_as_large_as_it_was_seen_in():
    """Beside small prefills compression costs nothing here; of large ones nothing is known, and the row says so."""
    tuner = Tuner(Limits(64, 10**12, 1, ("inline", "beside:32")), 1e18)
    for place, inline_s in [("inline", 2e-6)] * 8 + [("beside:32", 0.0)] * 4:
        whole = (PER_TOKEN + inline_s) * 2_000
        tuner.observe(prefill(2_000, place, kept=200), whole, 2_000 * inline_s, False)
    for _ in range(8):
        tuner.observe(decode(), FIXED, 0.0, False)
    assert tuner.measured
    for waiting, wanted in ((2_400, ("beside:32", CHEAPEST)), (16_000, ("inline", NOT_SEEN))):
        tuner.turns(Load(0.0, Queue(1), Queue(), Queue(), prefill_tokens=waiting))
        assert tuner.place() == wanted[0] and tuner._placed == wanted
