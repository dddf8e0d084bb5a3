"""What a user gets of a finished request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RequestMetrics:
    """Times are `time.perf_counter()` seconds; counts are tokens or pages.

    `scheduled_s` and `first_token_s` are None only for a request that was ended before it got there.
    """

    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float
    token_times_s: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    kv_len_before: int | None
    kv_len_after: int | None
    pages_freed: int
    compressed: bool
    preemptions: int
    images: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. `finish_reason` is "stop" (end-of-sequence token), "length" (max_tokens), "timeout" or
    "cancelled".

    logprobs: (prompt tokens - logprobs_from, vocab) float32, row i for what follows position logprobs_from + i.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    text: str
    finish_reason: str
    metrics: RequestMetrics
    logprobs: Tensor | None = None
