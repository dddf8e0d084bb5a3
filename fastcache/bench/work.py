"""What a measured round had to compute and to read, counted: the numerators of MFU and MBU. Pure; imports no torch.

Counted are matrix products and attention for prefill, weights and KV entries read for decode. Norms, activations,
embedding look-ups, writes and the cost of compression are left out, so neither share flatters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastcache.device.ceilings import Ceilings
from fastcache.results import RequestMetrics
from fastcache.stats import EngineStats

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def layer_parameters(model: Any) -> int:
    """Weights of the matrices in all layers of a `ModelConfig`; no embeddings, no output head, no vision tower."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.num_layers * model.hidden_size * (heads + 3 * model.intermediate_size)


def last_parameters(model: Any) -> int:
    """Weights of the last layer's matrices behind its attention."""
    return model.hidden_size * (model.num_heads * model.head_dim + 3 * model.intermediate_size)


def head_parameters(model: Any) -> int:
    return model.vocab_size * model.hidden_size


def prefill_flops(model: Any, start: int, length: int) -> int:
    """FLOPs of prefilling tokens `start` to `length` of one prompt; the ones before came from a prefix cache.

    Two per weight and token, and causal attention: token t has 4 FLOPs per head dimension and query head with each of
    the t tokens before it, so half of length^2 - start^2 pairs. Behind the last attention only the token that is
    sampled from goes on: one a prompt. The head runs for it, too: not counted.
    """
    pairs = (length**2 - start**2) / 2
    attention = 4 * model.num_heads * model.head_dim * model.num_layers * pairs
    fresh, last = length - start, last_parameters(model)
    return int(2 * ((layer_parameters(model) - last) * fresh + last) + attention)


def step_bytes(model: Any, dtype: str) -> int:
    """Bytes of weights that every decode step reads: all layers and the output head."""
    return ITEM_BYTES[dtype] * (layer_parameters(model) + head_parameters(model))


def kv_entries_read(metrics: RequestMetrics) -> int:
    """KV entries per head that a request's decode steps read: what compression left, and one more every step."""
    left = metrics.kv_len_after if metrics.compressed else metrics.prompt_tokens
    steps = metrics.output_tokens - 1  # the first token comes from prefill
    return int(steps * left) + steps * (steps + 1) // 2


def utilisation(
    model: Any,
    facts: dict[str, Any],
    requests: Sequence[RequestMetrics],
    stats: EngineStats,
    limits: Ceilings,
) -> dict[str, float | None]:
    """`prefill_mfu` and `decode_mbu` of one round; None for a phase that took no time.

    `facts` are `LLM.describe()`. Prompt tokens computed again after a preemption count at the mean cost of a token.
    """
    fresh = sum(m.prompt_tokens - m.cached_tokens for m in requests)
    flops = sum(prefill_flops(model, m.cached_tokens, m.prompt_tokens) for m in requests)
    done = flops * (stats.prefill_tokens - stats.mixed_prefill_tokens) / fresh if fresh else 0.0
    alone = 1 - stats.mixed_decode_tokens / max(stats.decode_tokens, 1)  # the rest was decoded in mixed steps
    read = stats.decode_steps * step_bytes(model, facts["dtype"])
    read += facts["kv_bytes_per_token"] * sum(kv_entries_read(m) for m in requests) * alone
    return {
        "prefill_mfu": _share(done, stats.prefill_time_s, limits.gemm_flop_s),
        "decode_mbu": _share(read, stats.decode_time_s, limits.copy_bytes_s) if stats.decode_steps else None,
    }


def _share(amount: float, seconds: float, per_second: float) -> float | None:
    return amount / seconds / per_second if amount and seconds > 0 else None
