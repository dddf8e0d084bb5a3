"""What a request may ask of an engine: told when it is added, not when its turn comes."""

from __future__ import annotations

from fastcache.config import EngineConfig, require
from fastcache.core import Sequence
from fastcache.engine.scheduler import Scheduler
from fastcache.errors import OutOfPages, PromptTooLong, QueueFull


def check_request(seq: Sequence, scheduler: Scheduler, max_model_len: int, config: EngineConfig) -> None:
    """Errors: `ConfigError`, `PromptTooLong`, `OutOfPages` for what can never run, `QueueFull` for now."""
    request, new_tokens = seq.request, seq.request.sampling.max_tokens
    require(
        request.timeout_s is None or request.timeout_s > 0,
        f"timeout_s is {request.timeout_s}; allowed is a positive number of seconds, or None.",
    )
    wanted = seq.prompt_len + new_tokens
    if wanted > max_model_len:
        raise PromptTooLong(
            f"a prompt of {seq.prompt_len} tokens with max_tokens {new_tokens} needs {wanted} positions, max_model_len "
            f"is {max_model_len}. Shorten the prompt, lower max_tokens or raise max_model_len."
        )
    require(
        0 <= request.compress_at <= seq.prompt_len,
        f"context_len is {request.context_len}; allowed is 0 to the prompt's {seq.prompt_len} tokens.",
    )
    at_once, step = scheduler.demand.tail(seq), scheduler.limits.max_num_batched_tokens
    require(
        at_once <= step,
        f"the compression method must see {at_once} tokens of a prompt in one step, and max_num_batched_tokens is "
        f"{step}. Raise it to at least {at_once}, shorten the context, or use another method.",
    )
    need, have = scheduler.demand.peak(seq, new_tokens), scheduler.allocator.num_pages - 1
    if need > have:
        raise OutOfPages(
            f"a prompt of {seq.prompt_len} tokens with max_tokens {new_tokens} needs {need} pages of "
            f"{config.page_size} tokens, the KV pool has {have}. Raise num_pages or gpu_memory_utilization, or shorten "
            "the request."
        )
    waiting, most = len(scheduler.waiting), config.max_waiting
    if most is not None and waiting >= most:
        raise QueueFull(f"{waiting} requests are waiting and max_waiting is {most}; send it again later.")
