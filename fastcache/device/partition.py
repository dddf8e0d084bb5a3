"""What a partition is, once made: two streams, what was asked, what was granted, and by whom."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastcache.device import streams


@dataclass(frozen=True)
class Partition:
    """Two streams and what is known about their SMs.

    `main` and `compress` are torch streams, None on the CPU. `requested_sms` and `granted_sms` map "main" and
    "compress" to SM counts; a granted None means the driver's answer is not known. `available` is True when
    green contexts carry what the configuration asked for; `exclusive` when the two sides share no SM.
    `reason` is one line, None when there is nothing to explain.
    """

    main: Any
    compress: Any
    provider: str
    available: bool
    exclusive: bool
    asked: bool
    reason: str | None = None
    requested_sms: dict[str, int] | None = None
    granted_sms: dict[str, int | None] | None = None
    attempts: tuple[dict[str, Any], ...] = ()
    granted_from: str = "none"

    @property
    def streams(self) -> tuple[Any, Any]:
        return self.main, self.compress

    def capture(self, graph: Any, stream: Any, pool: Any = None) -> AbstractContextManager:
        """Context manager: capture a CUDA graph on one of this partition's streams, and on no other."""
        return streams.capture(graph, stream, self.streams, pool)

    def report(self) -> dict[str, Any]:
        """The row's fields. `greenctx_available` is None when the configuration did not ask."""
        return {
            "greenctx_available": self.available if self.asked else None,
            "greenctx_reason": self.reason if self.asked else None,
            "requested_sms": self.requested_sms,
            "granted_sms": self.granted_sms,
            "greenctx_provider": self.provider if self.asked else None,
            "greenctx_exclusive": self.exclusive if self.asked else None,
            "greenctx_granted_from": self.granted_from if self.asked else None,
            "greenctx_attempts": [dict(attempt) for attempt in self.attempts],
        }
