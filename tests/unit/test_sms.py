"""Ratios to SM counts: what the driver can grant, nearest to what was asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.device.sms import DeviceSms, by_capability, grantable, plan_split
from fastcache.errors import ConfigError, UnsupportedCombination

H100 = DeviceSms(132, 8, 8)
DEVICES = st.sampled_from(
    [H100, DeviceSms(108, 4, 2), DeviceSms(80, 2, 2), DeviceSms(114, 8, 8), DeviceSms(64, 8, 8)]
)


@pytest.mark.parametrize(
    ("compress", "main", "expected"),
    [
        (0.2, 0.8, (104, 28)),
        (0.25, 0.75, (100, 32)),
        (0.06, 0.94, (124, 8)),
        (0.12, 0.88, (116, 16)),
        (0.03, 0.97, (128, 4)),
        (0.5, 0.5, (64, 68)),
        (0.25, 0.5, (64, 32)),
    ],
)
def test_h100(compress: float, main: float, expected: tuple[int, int]) -> None:
    split = plan_split(H100, compress, main)
    assert (split.main, split.compress) == expected
    assert split.requested_compress == round(132 * compress)


@given(DEVICES, st.floats(0.07, 0.93))
def test_whole_device_splits_leave_nothing_and_stay_near(sms: DeviceSms, compress: float) -> None:
    split = plan_split(sms, compress, 1 - compress)
    assert split.main + split.compress == sms.total and split.idle == 0
    assert split.group_size % sms.alignment == 0 and split.group_size >= sms.minimum
    if sms.minimum <= split.requested_compress <= sms.total - sms.minimum:
        assert abs(split.compress - split.requested_compress) <= sms.alignment / 2


@given(DEVICES, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_any_pair_of_ratios_is_grantable_or_refused(sms: DeviceSms, compress: float, main: float) -> None:
    if compress + main > 1:
        compress, main = compress / (compress + main), main / (compress + main)
    try:
        split = plan_split(sms, compress, main)
    except UnsupportedCombination:
        assert min(sms.total * compress, sms.total * main) < sms.minimum
        return
    assert split.main > 0 and split.compress > 0 and split.idle >= 0
    assert split.group_size % sms.alignment == 0
    if split.idle:
        assert split.main % sms.alignment == 0 and split.compress % sms.alignment == 0


@given(DEVICES, st.floats(0.07, 0.88), st.floats(0.0, 0.05))
def test_more_asked_is_never_less_granted(sms: DeviceSms, compress: float, more: float) -> None:
    low, high = plan_split(sms, compress, 1 - compress), plan_split(sms, compress + more, 1 - compress - more)
    assert high.compress >= low.compress


def test_too_small_says_what_can_be_granted() -> None:
    with pytest.raises(
        UnsupportedCombination, match=r"asks for 1 of 132 SMs.*8 to 128.*steps of 8.*124 to 4"
    ):
        plan_split(H100, 0.005, 0.5)
    with pytest.raises(UnsupportedCombination, match="greenctx_main_ratio"):
        plan_split(H100, 0.5, 0.005)


def test_a_device_too_small_to_split() -> None:
    with pytest.raises(ConfigError, match="14 SMs; a split needs 16"):
        plan_split(DeviceSms(14, 8, 8), 0.5, 0.5)


@pytest.mark.parametrize(("major", "expected"), [(7, (2, 2)), (8, (4, 2)), (9, (8, 8)), (12, (8, 8))])
def test_granularity_by_capability(major: int, expected: tuple[int, int]) -> None:
    sms = by_capability(132, major)
    assert (sms.minimum, sms.alignment) == expected


def test_grantable_names_both_sides() -> None:
    assert grantable(H100) == (
        "It grants 8 to 128 SMs to one side in steps of 8, and the other side the remaining 124 to 4."
    )
