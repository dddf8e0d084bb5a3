"""Moving averages that follow a device: exponentially forgotten sums, a few multiplications per observation."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

DECAY = 0.98  # about the last fifty observations count
# An estimate from observations that hardly differ is no better than what was believed before: the prior weighs as
# much as a spread of this share of the mean.
RESOLUTION = 0.05
LAST = 9  # observations that a median is of


class Ratio:
    """Sum of y over sum of x: seconds per token, say."""

    def __init__(self) -> None:
        self.count, self._x, self._y = 0, 0.0, 0.0

    def add(self, x: float, y: float) -> None:
        self.count += 1
        self._x = DECAY * self._x + x
        self._y = DECAY * self._y + y

    @property
    def value(self) -> float | None:
        return self._y / self._x if self._x > 0 else None


class Plane:
    """y = p * u + q * v by least squares, p not negative and q at least `least`, to which q is drawn where u and v
    do not tell the two apart."""

    def __init__(self, least: float = 0.0) -> None:
        self.count, self._least = 0, least
        self._uu = self._uv = self._vv = self._uy = self._vy = 0.0

    def add(self, u: float, v: float, y: float) -> None:
        self.count += 1
        self._uu = DECAY * self._uu + u * u
        self._uv = DECAY * self._uv + u * v
        self._vv = DECAY * self._vv + v * v
        self._uy = DECAY * self._uy + u * y
        self._vy = DECAY * self._vy + v * y

    def solve(self) -> tuple[float, float]:
        """(p, q). At least one observation with u > 0 must have been added."""
        weight = RESOLUTION**2 * self._vv
        vv, vy = self._vv + weight, self._vy + weight * self._least
        determinant = self._uu * vv - self._uv**2
        q = (self._uu * vy - self._uv * self._uy) / determinant if determinant > 0 else self._least
        q = max(q, self._least)
        p = (self._uy - q * self._uv) / self._uu
        if p < 0 and self._vv > 0:
            p, q = 0.0, max(self._vy / self._vv, self._least)
        return max(p, 0.0), q


class Middle:
    """The median of y over x among the last observations, each of which counts as much as its x: one that a compilation
    or a busy host spoilt does not count, which matters where few are made, and a small one hardly."""

    def __init__(self, last: int = LAST) -> None:
        self.count = 0
        self.value: float | None = None
        self._most = last
        self._last: deque[tuple[float, float]] = deque()
        self._sorted: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        self.count += 1
        self._last.append((y / x, x))
        insort(self._sorted, self._last[-1])
        if len(self._last) > self._most:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        half, so_far = sum([weight for _, weight in self._sorted]) / 2, 0.0
        for value, weight in self._sorted:
            so_far += weight
            if so_far >= half:
                self.value = value
                return


class Sides:
    """Of an SM split: seconds of prefill per token on its one side, and how many times as long as on the whole GPU a
    decode step lasts on the other, each while both are busy."""

    def __init__(self) -> None:
        self.prefill, self.decode = Middle(), Middle()

    @property
    def count(self) -> int:
        return min(self.prefill.count, self.decode.count)
