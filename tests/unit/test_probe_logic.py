"""What the probe's numbers mean: verdicts on recorded shapes of good and bad measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.device import probe_logic as logic

WHOLE = range(132)


def identity(main, compress, granted=(104, 28), **options):
    return logic.judge_identity(main, compress, granted, WHOLE, **options)


def test_a_disjoint_pair_as_granted_passes() -> None:
    verdict = identity(range(104), range(104, 132))
    assert verdict["passed"] and verdict["overlap"] == [] and verdict["main_count"] == 104


@pytest.mark.parametrize(
    ("main", "compress", "granted"),
    [
        (range(104), range(103, 131), (104, 28)),  # one SM on both sides
        (range(132), range(132), (104, 28)),  # no partition at all
        (range(100), range(104, 132), (104, 28)),  # fewer than granted
        (range(104), range(104, 132), (96, 28)),  # more than granted
        (range(104), range(200, 228), (104, 28)),  # ids the device does not have
        ([], range(28), (None, 28)),  # nothing ran
    ],
)
def test_anything_else_fails(main, compress, granted) -> None:
    assert not identity(main, compress, granted)["passed"]


def test_an_unknown_grant_judges_disjointness_only() -> None:
    assert identity(range(100), range(110, 132), (None, None))["passed"]
    assert not identity(range(100), range(90, 132), (None, None))["passed"]


def test_two_shared_sms_are_tolerated_only_when_said() -> None:
    assert identity(range(106), range(104, 132), (106, 28), shared_allowed=2)["passed"]
    assert not identity(range(107), range(104, 132), (107, 28), shared_allowed=2)["passed"]


@given(st.integers(1, 131))
def test_every_disjoint_cover_passes(n: int) -> None:
    assert identity(range(n), range(n, 132), (n, 132 - n))["passed"]


@pytest.mark.parametrize(
    ("at", "over", "passed"),
    [(2003, 4010, True), (2003, 2004, False), (4001, 4002, False), (2003, 6020, False), (900, 4000, False)],
)
def test_capacity(at: float, over: float, passed: bool) -> None:
    assert logic.judge_capacity(2000, at, over, 104)["passed"] is passed


@pytest.mark.parametrize(
    ("delay", "control", "passed"),
    [(65, 80_000, True), (80_000, 80_000, False), (65, 70, False), (6_000, 80_000, False)],
)
def test_independence_needs_its_control(delay: float, control: float, passed: bool) -> None:
    assert logic.judge_independence(20_000, delay, control)["passed"] is passed


def test_a_graph_stays_and_the_guard_holds() -> None:
    good = logic.judge_graph(range(104), range(104), WHOLE, True)
    assert good["passed"] and good["captured_without_stream_leaves"]
    assert not logic.judge_graph(range(105), range(104), WHOLE, True)["passed"]
    assert not logic.judge_graph(range(104), range(104), WHOLE, False)["passed"]
    assert not logic.judge_graph([], range(104), WHOLE, True)["passed"]


def test_flat_memory_and_a_leak() -> None:
    flat = [10**10 - (i % 3) * 1000 for i in range(20)]
    assert logic.judge_memory(flat, 1000, 2 << 20)["passed"]
    leaking = [10**10 - i * (8 << 20) for i in range(20)]
    verdict = logic.judge_memory(leaking, 1000, 2 << 20)
    assert not verdict["passed"] and verdict["lost_bytes"] == 10 * (8 << 20)


def test_compute() -> None:
    assert logic.judge_compute({"gemm": 0.0, "attention": 3e-3}, 1e-2)["passed"]
    assert not logic.judge_compute({"gemm": 0.0, "attention": 0.5}, 1e-2)["passed"]
    assert not logic.judge_compute({"gemm": float("nan")}, 1e-2)["passed"], "NaN never passes"


def test_the_conclusion_needs_something_to_conclude_from() -> None:
    assert not logic.conclude([])
    assert logic.conclude([{"passed": True}]) and not logic.conclude([{"passed": True}, {"passed": False}])
