"""What the serving page concludes from rows, held against sums done by hand: each target once reached, once missed."""

from __future__ import annotations

import pytest
from serving_findings import claims

TTFT_P1, SPEED_P1 = "mean TTFT, p1c1d8 over dynamic", "generated tok/s, dynamic over p1c1d8"
TTFT, SPEED = (
    "mean TTFT, best static policy over dynamic",
    "generated tok/s at saturation, dynamic over the best static policy",
)
MEMORY, RATE = "share of KV memory in use saved by immediate release", "sustained rate, requests per second"
OVER_FULL = "sustained rate over that of the uncompressed cache"


WORKLOAD = {"context": {"low": 384, "high": 1536}, "output": {"low": 32, "high": 96}, "arrivals": "poisson"}
OTHER = WORKLOAD | {"output": {"low": 384, "high": 512}}


def state(**changes: int) -> dict:
    """A sample of the pool and the queues."""
    empty = {"time_s": 9.0, "before": 5, "compressed": 15, "whole": 0, "held": 0, "running": 6, "waiting": 0}
    return empty | changes


def row(policy: str, rate: float, ttft: float, speed: float, **changes) -> dict:
    """A rate that is sustained, with everything in order, unless something is said."""
    values = {
        "status": "ok",
        "model": "a-model",
        "policy": policy,
        "setting": "snapkv x5",
        "rate": rate,
        "immediate_release": True,
        "host_busy": False,
        "sustained": True,
        "requests": 100,
        "finished": 100,
        "ttft_s": {"mean": ttft, "p99": 3 * ttft},
        "queue_s": {"mean": ttft / 2},
        "tpot_s": {"mean": 0.01},
        "token_gap_s": {"p50": 0.008},
        "window_s": 10.0,
        "elapsed_s": 10.0,
        "output_tokens": 6000,
        "output_tok_s": speed,
        "stage_share": {"prefill": 0.1, "mixed": 0.4, "decode": 0.45, "compress": 0.0, "idle": 0.05},
        "mean_kv_bytes": 1000.0,
        "peak_pages": 30,
        "num_pages": 101,
        "peak_running": 7,
        "pages_over_time": [state(running=6, waiting=1)],
        "cell": {"workload": WORKLOAD},
    }
    return values | changes


def late(policy: str, rate: float, ttft: float, speed: float, **changes) -> dict:
    return row(policy, rate, ttft, speed, **{"sustained": False, "finished": 50} | changes)


HELD = {"immediate_release": False, "mean_kv_bytes": 2000.0}
HELD_PAGES = [state(held=60)]
GOOD = [
    row("dynamic", 2, 0.02, 100),
    row("dynamic", 12, 0.03, 600),
    row("dynamic", 40, 0.1, 2000),
    row("dynamic", 60, 0.4, 2600),
    row("p1c1d8", 2, 0.02, 100),
    row("p1c1d8", 12, 0.2, 190),
    late("p1c1d8", 40, 2.5, 200),
    row("p4c4d8", 2, 0.05, 100),
    row("p4c4d8", 12, 0.18, 580),
    late("p4c4d8", 20, 1.5, 700),
    row("dynamic", 12, 0.03, 600, **HELD),
    row("dynamic", 40, 0.1, 1900, **HELD | {"mean_kv_bytes": 4000.0}),
    row("dynamic", 20, 0.1, 900, setting="full"),
    row("dynamic", 40, 0.2, 1500, setting="full"),
    late("dynamic", 60, 1.5, 1600, setting="full"),
]


def by_name(rows: list[dict]) -> dict:
    return {claim.what: claim for claim in claims(rows)}


def test_every_target_is_computed_and_what_is_reached_needs_no_excuse():
    found = by_name(GOOD)
    expected = {
        TTFT_P1: 25.0,  # at 40: 2.5 over 0.1
        SPEED_P1: 13.0,  # 2,600 at 60 over 200 at 40
        MEMORY: 0.5,  # the least: at 12
        RATE: 60.0,
        TTFT: 6.0,  # at 12 both static ones hold; the better has 0.18 over 0.03
        SPEED: 2600 / 700,
        OVER_FULL: 1.5,
    }
    assert {name: claim.ours for name, claim in found.items()} == pytest.approx(expected)
    assert all(claim.verdict == "reached" and not claim.reason for claim in found.values())
    assert found[TTFT].where == "a-model, snapkv x5, p4c4d8, at 12 requests/s"
    assert found[SPEED_P1].where == "a-model, snapkv x5, p1c1d8, at 60 against 40 requests/s"


def changed(index: int, **changes) -> list[dict]:
    return [r | changes if i == index else r for i, r in enumerate(GOOD)]


def test_a_throughput_that_is_missed_says_what_the_time_went_into():
    found = by_name([*changed(3, output_tok_s=1000.0), late("p2c2d8", 40, 2.0, 1500)])
    claim = found[SPEED]
    assert claim.verdict == "missed" and claim.ours == pytest.approx(2000 / 1500)
    assert "dynamic, snapkv x5 at 40/s: prefill 10%, mixed 40%, decode 45%, idle 5%" in claim.reason
    # half of its time has prompts in it: all of it would be twice the tokens
    assert "would be 2.7 times; at most 7 requests ran at once against 7" in claim.reason
    # 1.5 x 1,500 tokens of 60 to a request; 50 ms of steps with prompts for each
    assert (
        "1.5 times needs 38 prompts per second; at 50.0 ms of such steps for each, 20 are the most"
        in claim.reason
    )
    assert "decodes 6.0 sequences at once, a token every 8.0 ms" in claim.reason
    assert found[SPEED_P1].verdict == "missed" and "would be 20.0 times" in found[SPEED_P1].reason


def test_an_engine_that_was_idle_was_not_at_its_limit():
    idle = {"prefill": 0.1, "mixed": 0.1, "decode": 0.4, "compress": 0.0, "idle": 0.4}
    claim = by_name(changed(3, output_tok_s=2100.0, stage_share=idle))[SPEED_P1]
    assert claim.verdict == "missed" and "Ours was not at its limit" in claim.reason


def test_a_first_token_that_is_missed_says_who_waited():
    claim = by_name(changed(1, ttft_s={"mean": 0.06, "p99": 0.1}, queue_s={"mean": 0.04}))[TTFT]
    assert claim.verdict == "missed" and claim.ours == pytest.approx(3.0)
    assert (
        "dynamic, snapkv x5 at 12/s has a mean TTFT of 60 ms, 40 ms of it before its first step"
        in claim.reason
    )
    assert "p4c4d8, snapkv x5 at 12/s has a mean TTFT of 180 ms, 90 ms" in claim.reason


def test_a_static_policy_counts_where_its_tokens_still_come_as_fast_as_unloaded():
    slow = {"tpot_s": {"mean": 0.021}}
    found = by_name([r | slow if r["policy"] == "p4c4d8" and r["rate"] == 12 else r for r in GOOD])
    assert found[TTFT].ours == pytest.approx(0.2 / 0.03) and "p1c1d8, at 12" in found[TTFT].where
    never = [r | slow if r["policy"].startswith("p") and r["rate"] > 2 else r for r in GOOD]
    claim = by_name(never)[TTFT]
    assert claim.ours == pytest.approx(1.0) and "at 2 requests/s" in claim.where and claim.reason


def test_memory_that_is_missed_says_how_much_was_held():
    rows = changed(10, mean_kv_bytes=1100.0, pages_over_time=HELD_PAGES)
    claim = by_name(rows)[MEMORY]
    assert claim.verdict == "missed" and claim.ours == pytest.approx(1 - 1000 / 1100)
    assert (
        "75% were held for nothing" in claim.reason and "25% were contexts not yet compressed" in claim.reason
    )


def test_a_sustained_rate_that_is_missed_shows_the_rate_that_broke_it():
    rows = [late(*("dynamic", r["rate"], 1.0, 1500)) if r is GOOD[2] or r is GOOD[3] else r for r in GOOD]
    found = by_name(rows)
    assert found[RATE].ours == 12.0 and found[RATE].verdict == "missed"
    assert "dynamic, snapkv x5 at 40/s: prefill 10%" in found[RATE].reason
    assert "p99 TTFT 3.0 s, at most 7 requests at once, 30% of the KV pool" in found[RATE].reason
    claim = found[OVER_FULL]
    assert claim.ours == pytest.approx(0.3) and "Uncompressed: dynamic, full at 60/s" in claim.reason
    both = by_name([r for r in GOOD if r["rate"] < 60])
    assert both[OVER_FULL].verdict == "not shown" and both[OVER_FULL].ours == 1.0
    assert (
        "no limit was found" in both[OVER_FULL].reason and "2,000 generated tok/s" in both[OVER_FULL].reason
    )
    # 100 prompts in half of 10 s: 50 ms each
    assert "50.0 ms of steps with prompts for each, enough for 20 per second" in both[OVER_FULL].reason
    low = by_name([r for r in GOOD if r["rate"] < 40])[RATE]
    assert low.verdict == "not shown" and low.reason == "No rate above 12/s was measured."


def test_a_rate_that_nothing_sustains_is_a_miss():
    found = by_name([late("dynamic", 40, 2.5, 260), row("dynamic", 40, 0.1, 1900, setting="full")])
    assert found[RATE].ours == 0.0 and found[RATE].verdict == "missed"
    assert "p99 TTFT 7.5 s" in found[RATE].reason
    mute = late("dynamic", 40, 2.5, 0.1, tpot_s=None, token_gap_s=None)  # nobody got a second token
    assert "a token every (unknown)" in by_name([mute])[RATE].reason


def test_what_a_short_window_flatters_is_said():
    queue = {"pages_over_time": [state(running=8, waiting=9)]}
    found = by_name(changed(8, **queue))
    assert "p1c1d8, snapkv x5 at 40/s is overloaded" in found[TTFT_P1].caveat
    assert "At 12/s, the highest rate it sustains, it is 6.7 times." in found[TTFT_P1].caveat
    assert "1.00 at 2/s (p1c1d8), 6.00 at 12/s (p4c4d8), 25.00 at 40/s (p1c1d8)." in found[TTFT].caveat
    assert "9 requests waited for p4c4d8 at 12/s and 8 ran" in found[TTFT].caveat
    assert "waited" not in by_name(GOOD)[TTFT].caveat
    full = row("dynamic", 12, 0.03, 600, setting="full", mean_kv_bytes=1250.0)
    assert "Against the uncompressed cache at 12/s it is 0.20" in by_name([*GOOD, full])[MEMORY].caveat
    # 100 prompts in 4 s, of which 5 s are spent on them in all
    busy = by_name(changed(3, window_s=4.0))[RATE]
    assert (
        busy.verdict == "reached"
        and "60/s held for the 4 s that requests arrived, not for longer" in busy.caveat
    )
    assert not by_name(GOOD)[RATE].caveat


def test_a_static_policy_that_had_more_to_give_is_named():
    rows = [r | {"sustained": True, "finished": 100} if r["policy"] == "p4c4d8" else r for r in GOOD]
    claim = by_name(rows)[SPEED]
    assert claim.ours == pytest.approx(13.0)
    assert (
        claim.caveat == "Left out, not driven beyond what they can do: p4c4d8, snapkv x5 at 20/s, 700 tok/s."
    )


def test_what_was_not_measured_is_said_where_policies_were_compared_and_left_out_elsewhere():
    rows = [r for r in GOOD if r["immediate_release"] and r["setting"] != "full"]
    found = by_name(rows)
    assert {w for w, c in found.items() if c.verdict == "not measured"} == {MEMORY, OVER_FULL}
    alone = [r | {"setting": "knorm x5"} for r in GOOD[:4]]
    assert set(by_name(alone)) == {RATE}


def test_other_requests_busy_hosts_and_static_policies_that_had_more_to_give_are_not_compared():
    other = [r | {"cell": {"workload": OTHER}} for r in GOOD if r["policy"] != "dynamic"]
    found = by_name([*GOOD[:4], *other])
    assert found[RATE].ours == 60.0 and TTFT not in found
    assert found[RATE].where == "a-model (384-1536 + 32-96 tokens), snapkv x5"
    both = claims([*GOOD, *(r | {"cell": {"workload": OTHER}} for r in GOOD)])
    assert len(both) == 14 and sum("384-512 tokens" in claim.where for claim in both) == 7
    busy = [r | {"host_busy": r["policy"] == "p4c4d8"} for r in GOOD]
    assert "p1c1d8" in by_name(busy)[TTFT].where
    at_ease = [r for r in GOOD if r["sustained"]]
    assert by_name(at_ease)[SPEED].verdict == "not measured"
