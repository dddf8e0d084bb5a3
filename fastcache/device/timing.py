"""How long a piece of work took on its device, learned without making anybody wait."""

from __future__ import annotations

import time
from typing import Any


class Span:
    """Time between `start` and `stop` on the current stream. `seconds` is None until the device has passed both."""

    def __init__(self, device: Any) -> None:
        """device: a torch device."""
        self._events: tuple[Any, Any] | None = None
        self._start_s = self._end_s = 0.0
        if device.type == "cuda":
            import torch

            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))

    def start(self) -> None:
        if self._events is None:
            self._start_s = time.perf_counter()
        else:
            self._events[0].record()

    def stop(self) -> None:
        if self._events is None:
            self._end_s = time.perf_counter()
        else:
            self._events[1].record()

    def seconds(self) -> float | None:
        if self._events is None:
            return self._end_s - self._start_s
        start, end = self._events
        return start.elapsed_time(end) / 1e3 if end.query() else None
