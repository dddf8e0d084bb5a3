"""Which requests an open-loop workload sends: lengths, and how they arrive. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fastcache.config import StrictConfig, one_of, positive_int, require

ARRIVALS = ("poisson", "fixed", "trace")


def positive(name: str, value: Any) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    require(good, f"{name} is {value!r}; allowed is a positive number.")


@dataclass(frozen=True)
class LengthConfig(StrictConfig):
    """How many tokens. low == high is fixed; with a median the length is log-normal, else uniform."""

    low: int
    high: int
    median: float | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            positive_int(f"a length's {name}", getattr(self, name))
        require(self.low <= self.high, f"a length has low {self.low} above high {self.high}.")
        require(
            (self.median is None) == (self.sigma is None), "a log-normal length needs a median and a sigma."
        )
        for name in ("median", "sigma"):
            if getattr(self, name) is not None:
                positive(f"a length's {name}", getattr(self, name))

    @classmethod
    def read(cls, name: str, value: Any) -> Self:
        if isinstance(value, int):
            return cls(value, value)
        require(isinstance(value, Mapping), f"{name} is {value!r}; allowed is a number or a distribution.")
        require({"low", "high"} <= set(value), f"{name} needs `low` and `high`.")
        return cls.from_dict(value)


@dataclass(frozen=True)
class OpenLoopConfig(StrictConfig):
    """Which requests come, and when. `context` and `output` are lengths in tokens; with a `trace` they are the bounds
    of what its rows ask for. `dataset` is a prompt set, a file or a folder, of which the prompts that fit `context`
    are sent. `images` pictures per request are part of its context."""

    context: LengthConfig
    output: LengthConfig
    arrivals: str = "poisson"
    trace: str | None = None
    dataset: str | None = None
    images: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "output"):
            value = getattr(self, name)
            if not isinstance(value, LengthConfig):
                object.__setattr__(self, name, LengthConfig.read(f"serving.workload.{name}", value))
        one_of("serving.workload.arrivals", self.arrivals, ARRIVALS)
        require(
            self.arrivals != "trace" or self.trace is not None,
            "arrivals 'trace' needs `trace`: a CSV with TIMESTAMP, ContextTokens, GeneratedTokens.",
        )
        require(
            self.trace is None or self.dataset is None,
            "serving.workload has a `trace` and a `dataset`, and both say how long prompts are; give one.",
        )
        require(
            isinstance(self.images, int) and self.images >= 0,
            f"serving.workload.images is {self.images!r}; allowed is 0 or a positive integer.",
        )
