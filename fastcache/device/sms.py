"""From ratios to SM counts: what the driver can grant, nearest to what was asked. Pure, no torch.

A split is one aligned group and the remainder: the driver rounds the group up to the device's granularity and
gives the rest to the other side. On 132 SMs with granularity 8 that is 8/124, 16/116, ... 128/4, and either
side can be the group. Source: CUDA driver API, cuDevSmResourceSplitByCount.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastcache.config import require
from fastcache.errors import UnsupportedCombination

# (minimum partition, multiple) by compute capability major, CUDA programming guide, "Green Contexts".
GRANULARITY = {6: (2, 2), 7: (2, 2), 8: (4, 2)}
GRANULARITY_FROM_9 = (8, 8)


@dataclass(frozen=True)
class DeviceSms:
    """How many SMs a device has and in which steps it splits them. `source`: driver | table."""

    total: int
    minimum: int
    alignment: int
    source: str = "table"


@dataclass(frozen=True)
class SmSplit:
    """A split to ask the driver for. All counts are SMs.

    `requested_*` is the ratio times the device, rounded to an integer; `main` and `compress` are the nearest
    counts the device can grant. `group` names the side that is the aligned group; the other side is what
    remains of `main + compress`. `idle` SMs belong to neither.
    """

    total: int
    requested_main: int
    requested_compress: int
    main: int
    compress: int
    group: str

    @property
    def idle(self) -> int:
        return self.total - self.main - self.compress

    @property
    def group_size(self) -> int:
        return self.main if self.group == "main" else self.compress


def by_capability(total: int, major: int) -> DeviceSms:
    """Granularity by compute capability, for when the driver cannot be asked."""
    minimum, alignment = GRANULARITY.get(major, GRANULARITY_FROM_9)
    return DeviceSms(total, minimum, alignment)


def plan_split(sms: DeviceSms, compress_ratio: float, main_ratio: float) -> SmSplit:
    """The grantable split nearest to the two ratios of the whole device.

    Ratios that sum to 1 use the whole device; below that, both sides become aligned groups and the rest idles.
    Errors: UnsupportedCombination when a side is too small for this device, naming the counts that are possible;
    ConfigError when the device has nothing to split.
    """
    require(
        sms.total >= 2 * sms.minimum, f"this device has {sms.total} SMs; a split needs {2 * sms.minimum}."
    )
    asked = {"main": round(sms.total * main_ratio), "compress": round(sms.total * compress_ratio)}
    for side, count in asked.items():
        if 2 * count < min(sms.minimum, _smallest_remainder(sms)):
            raise UnsupportedCombination(
                f"greenctx_{side}_ratio asks for {count} of {sms.total} SMs, which this device cannot grant. "
                f"{grantable(sms)}"
            )
    # Half a step short of the device is a whole split: rounding the ratios should not leave SMs idle.
    if sum(asked.values()) > sms.total - sms.alignment / 2:
        return _whole(sms, asked)
    return _with_idle(sms, asked)


def grantable(sms: DeviceSms) -> str:
    """One sentence that says which counts this device grants."""
    top = _largest_group(sms)
    return (
        f"It grants {_round_up(sms.minimum, sms.alignment)} to {top} SMs to one side in steps of "
        f"{sms.alignment}, and the other side the remaining {sms.total - sms.minimum} to {sms.total - top}."
    )


def _whole(sms: DeviceSms, asked: dict[str, int]) -> SmSplit:
    candidates = []
    for group, rest in (("main", "compress"), ("compress", "main")):
        size = _nearest_group(sms, asked[group])
        counts = {group: size, rest: sms.total - size}
        error = sum(abs(counts[side] - asked[side]) for side in asked)
        candidates.append((error, group, counts))
    # min keeps the first of equals: the main stream is the aligned group, whose clusters the driver guarantees.
    _, group, counts = min(candidates, key=lambda candidate: candidate[0])
    return SmSplit(sms.total, asked["main"], asked["compress"], counts["main"], counts["compress"], group)


def _with_idle(sms: DeviceSms, asked: dict[str, int]) -> SmSplit:
    main, compress = (_nearest_group(sms, asked[side]) for side in ("main", "compress"))
    if main + compress > sms.total:
        return _whole(sms, asked)
    return SmSplit(sms.total, asked["main"], asked["compress"], main, compress, "main")


def _nearest_group(sms: DeviceSms, count: int) -> int:
    nearest = sms.alignment * max(1, (2 * count + sms.alignment) // (2 * sms.alignment))
    return min(max(nearest, _round_up(sms.minimum, sms.alignment)), _largest_group(sms))


def _largest_group(sms: DeviceSms) -> int:
    return sms.alignment * ((sms.total - 1) // sms.alignment)


def _smallest_remainder(sms: DeviceSms) -> int:
    return sms.total - _largest_group(sms)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
