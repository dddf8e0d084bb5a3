"""Whether prefill and decode run side by side, each on its side of an SM split. Pure functions of numbers; no clock.

A prefill beside decode steps takes longer than on the whole GPU, and so do they, but neither waits for the other. What
both take alone is known wherever these are asked what a split is worth.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastcache.engine.policy import Costs, Limits

# A split must gain more than this share of the prefill, for throughput: times of equal steps vary.
SIDE_MARGIN = 0.02
# Tokens of a prefill on its side: at most as many as fill the matrix units, so that first tokens do not wait for
# each other; prompts of fewer are over before a decode step beside them is, and tell nothing about others.
MOST_TOKENS, LEAST_TOKENS = 4_096, 512
# Decode steps that are launched on their side and still run there when the prefill has ended: one for certain, the next
# one half of the time.
LATE_STEPS = 1.5


def worth_trying(costs: Costs, limits: Limits, blocked: bool, prompt_tokens: int) -> tuple[str, ...]:
    """Splits that may be taken once they are measured: with a bound on TPOT, or while requests wait for decode steps
    (`blocked`); else prompts come first anyway."""
    known = costs.decode_fixed_s is not None and costs.prefill_s_per_token
    useful = limits.tpot_s is not None or blocked
    return limits.splits if known and useful and prompt_tokens >= LEAST_TOKENS else ()


def gains_s(costs: Costs, share: float, tokens: int) -> dict[str, float]:
    """Seconds that a prefill of `tokens` saves on each split: what it takes on the whole GPU, and the decode steps done
    meanwhile, less its time there, and less what the decode steps lose that are still on their side when it ends.
    `share`: of a decode step that is worth waiting for."""
    gains = {}
    for name, aside_s in costs.aside_s_per_token.items():
        lasts = costs.beside[name]
        late_s = LATE_STEPS * max(lasts - 1, 0.0) * costs.decode_fixed_s
        gains[name] = tokens * (costs.compressed_s_per_token + share * aside_s / lasts - aside_s) - late_s
    return gains


def most(gains: Mapping[str, float], costs: Costs, tokens: int, otherwise_s: float) -> str | None:
    """The split that gains most, if clearly more than `otherwise_s`."""
    best = max(gains, key=gains.__getitem__, default=None)
    margin = SIDE_MARGIN * tokens * costs.prefill_s_per_token
    return best if best is not None and gains[best] > max(otherwise_s, 0.0) + margin else None


def lasts_s(costs: Costs, kv_bytes: float) -> dict[str, float]:
    """Seconds of a decode step beside a prefill, by split."""
    alone_s = costs.decode_fixed_s + (costs.decode_s_per_byte or 0.0) * kv_bytes
    return {name: times * alone_s for name, times in costs.beside.items()}


def soonest(
    costs: Costs, lasts: Mapping[str, float], tokens: int, bound_s: float, otherwise_s: float
) -> str | None:
    """The split that computes `tokens` of prompts soonest, if sooner than in `otherwise_s` and with decode steps within
    the bound. Their first tokens are noticed when the decode step ends that runs then."""
    ends = {
        name: costs.aside_s_per_token[name] * tokens + seconds
        for name, seconds in lasts.items()
        if seconds <= bound_s
    }
    best = min(ends, key=ends.__getitem__, default=None)
    return best if best is not None and ends[best] < otherwise_s else None
