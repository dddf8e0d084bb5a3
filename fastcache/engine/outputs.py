"""What a user gets of a sequence that has ended."""

from __future__ import annotations

import torch

from fastcache.core import Sequence
from fastcache.results import RequestMetrics, RequestOutput

ENDED_FROM_OUTSIDE = ("timeout", "cancelled")


def request_output(seq: Sequence, text: str, now_s: float) -> RequestOutput:
    """`text`: its decoded output. `now_s`: when it ended, if that was not with a token."""
    request, times = seq.request, seq.token_times_s
    metrics = RequestMetrics(
        arrival_s=request.arrival_s,
        scheduled_s=seq.scheduled_s,
        first_token_s=times[0] if times else None,
        finished_s=now_s if seq.finish_reason in ENDED_FROM_OUTSIDE else times[-1],
        token_times_s=tuple(times),
        prompt_tokens=seq.prompt_len,
        output_tokens=len(seq.output_ids),
        cached_tokens=seq.cached_tokens,
        kv_len_before=seq.kv_len_before,
        kv_len_after=seq.kv_len_after,
        pages_freed=seq.pages_freed,
        compressed=seq.compressed,
        preemptions=seq.preemptions,
        images=len(request.images),
        image_tokens=sum(image.length for image in request.images),
    )
    return RequestOutput(
        request.request_id,
        request.prompt_token_ids,
        seq.output_ids,
        text,
        seq.finish_reason,
        metrics,
        torch.cat(seq.logprobs) if seq.logprobs else None,
    )
