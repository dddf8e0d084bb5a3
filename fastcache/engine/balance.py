"""How prefill and decode share a step, from what was measured on this device. Pure functions of numbers; no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fastcache.engine import side_by_side
from fastcache.engine.policy import NOT_MEASURED, Costs, Limits

# A mixed step must gain more than this share of the decode step it replaces: the time of equal steps varies.
MIX_MARGIN = 0.2
PROBE = 1  # the budget, by number, that tells whether mixed steps can pay at all
# Tokens of a mixed step that is made to last a given time are a multiple of this.
CHUNK_STEP = 64
SHORTEST_S = 1e-6  # no step is shorter
# Where TPOT is bounded: prompts that would take more than so many steps come before the bound, in steps that last up to
# so many times as long. Where no step is within it, the smallest is taken that computes prompts nearly as fast as any.
BACKLOGS, NEARLY = ((5, 1.5), (10, 2.0), (16, 4.0)), 0.8
LONG_STEP = max(times for _, times in BACKLOGS)


class Mix(NamedTuple):
    """What a mixed step would be made of. `pending` requests wait or are in prefill, `decoding` sequences would ride
    along, and their step reads `kv_bytes`; `at_once` run together once everybody has come in who may. `blocked`: some
    must wait for a running one to end. `prompt_tokens`: of those pending, up to a full step."""

    pending: int
    decoding: int
    at_once: int
    blocked: bool
    kv_bytes: float
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Balance:
    """How the next prefill shares the GPU with decoding sequences: together in steps of `chunk` tokens, beside them on
    one side of an SM split, or not.
    `predicted`: by budget, seconds that a mixed step saves, by split, that a prefill of the prompts there saves; where
    TPOT is bounded, that a mixed step, or a decode step beside a prefill, lasts."""

    together: bool
    chunk: int | None
    reason: str
    predicted: Mapping[int | str, float] = field(default_factory=dict)
    split: str | None = None

    @property
    def choice(self) -> str:
        if self.split is not None:
            return f"side by side, {self.split}"
        return "together" if self.together else "prefill alone"


GAIN, NO_GAIN = "mixed steps save decode steps", "a mixed step costs more than the decode step it saves"
PROMPTS_FIRST = "no request waits for decode steps: prompts first"
WITHIN = "the largest mixed step within the bound on TPOT"
TIGHT = "no mixed step is within the bound on TPOT: the smallest that is nearly as fast as any"
BACKLOG = "many prompts wait, which come before the bound on TPOT: a longer step"
BESIDE_GAINS, BESIDE_WITHIN = (
    "a prefill beside decode steps saves most",
    "beside decode steps within the bound on TPOT, prompts are computed soonest",
)


def worth_trying(costs: Costs, limits: Limits, mix: Mix) -> tuple[int, ...]:
    """Budgets that may be taken once they are measured.

    For throughput, those that would gain most if a mixed step cost nothing of its own. One of them is tried first: what
    the others cost is much like it, and every trial breaks up what would have been prefilled together. Where TPOT is
    bounded, from the smallest on up to the first that is too long.
    """
    if costs.decode_fixed_s is None or not costs.prefill_s_per_token:
        return ()
    chunks = roomy(limits, mix)
    if limits.tpot_s is None:
        if not mix.blocked:
            return ()
        probe, gains = chunks[PROBE : PROBE + 1] or chunks, _gains_s(costs, mix, chunks)
        if max((gains[chunk] for chunk in probe), default=0.0) <= MIX_MARGIN * costs.decode_fixed_s:
            return ()
        if any(chunk not in costs.mixed_s for chunk in probe):
            return probe
        rates = _per_token(gains, mix)
        best = max(rate for chunk, rate in rates.items() if chunk in costs.mixed_s)
        return tuple(chunk for chunk in chunks if chunk in costs.mixed_s or rates[chunk] > best)
    within = _up_to(costs, chunks, mix, limits.tpot_s)
    if within and mix.prompt_tokens <= BACKLOGS[0][0] * (within[-1] - mix.decoding):
        return within
    return _up_to(costs, chunks, mix, LONG_STEP * limits.tpot_s)


def roomy(limits: Limits, mix: Mix) -> tuple[int, ...]:
    """Budgets of which decoding rows take no more than a half, or else the largest."""
    return tuple(chunk for chunk in limits.chunks if chunk >= 2 * mix.decoding) or limits.chunks[-1:]


def _up_to(costs: Costs, chunks: tuple[int, ...], mix: Mix, seconds: float) -> tuple[int, ...]:
    """Budgets whose steps last no longer, and the next larger one, which has to be measured to be told from them."""
    known = [chunk in costs.mixed_s and _lasts_s(costs, mix, chunk) <= seconds for chunk in chunks]
    return chunks[: known.index(False) + 1] if False in known else chunks


def balance(costs: Costs, limits: Limits, mix: Mix) -> Balance:
    """How the next prefill runs while sequences decode: for throughput, or within a bound on TPOT."""
    chosen = _mixed(costs, limits, mix)
    known = costs.beside and costs.decode_fixed_s is not None and costs.prefill_s_per_token
    if not known or mix.prompt_tokens < side_by_side.LEAST_TOKENS:
        return chosen
    if limits.tpot_s is not None:
        return _bounded_beside(costs, limits, mix, chosen)
    return _beside(costs, mix, chosen) if mix.blocked else chosen


def _beside(costs: Costs, mix: Mix, chosen: Balance) -> Balance:
    """On the split that gains more for the prompts there than what was `chosen` without one, if any does."""
    tokens = min(mix.prompt_tokens, side_by_side.MOST_TOKENS)
    gains = side_by_side.gains_s(costs, _share(mix), tokens)
    otherwise = tokens * _per_token(chosen.predicted, mix)[chosen.chunk] if chosen.together else 0.0
    split = side_by_side.most(gains, costs, tokens, otherwise)
    return _or_split(chosen, gains, split, BESIDE_GAINS)


def _bounded_beside(costs: Costs, limits: Limits, mix: Mix, chosen: Balance) -> Balance:
    """On the split that computes the prompts sooner than mixed steps do, if any does while decode steps last no longer
    than the bound, or than the mixed step does."""
    lasts = side_by_side.lasts_s(costs, mix.kv_bytes)
    ends_s, step_s = math.inf, 0.0
    if chosen.together:
        steps = math.ceil(mix.prompt_tokens / max(chosen.chunk - mix.decoding, 1))
        if steps == 1:
            return chosen
        step_s = _interpolated(chosen.predicted, chosen.chunk)
        ends_s = steps * step_s
    split = side_by_side.soonest(costs, lasts, mix.prompt_tokens, max(limits.tpot_s, step_s), ends_s)
    return _or_split(chosen, lasts, split, BESIDE_WITHIN)


def _or_split(chosen: Balance, predicted: Mapping[str, float], split: str | None, reason: str) -> Balance:
    """What was `chosen` without a split, or that split; with what was predicted for all of them."""
    everything = {**chosen.predicted, **predicted}
    if split is None:
        return replace(chosen, predicted=everything)
    return Balance(False, None, reason, everything, split)


def _mixed(costs: Costs, limits: Limits, mix: Mix) -> Balance:
    """In mixed steps, or with prompts alone.

    A mixed step reads the weights once for both, so it takes the place of a decode step and of its tokens' share of a
    prefill. The saving is real only if decode steps are what the rest waits for, and then a step saves as much as it
    has rows of all that will run at once. In a burst that fits, the last prompt's tokens all come after it, whoever
    rode along before.
    """
    if costs.decode_fixed_s is None or not costs.prefill_s_per_token:
        return Balance(False, None, NOT_MEASURED)
    known = tuple(chunk for chunk in roomy(limits, mix) if chunk in costs.mixed_s)
    if not known:
        return Balance(False, None, NOT_MEASURED if worth_trying(costs, limits, mix) else _alone(mix))
    if limits.tpot_s is not None:
        return _within(costs, mix, limits, known)
    gains = _gains_s(costs, mix, known)
    rates = _per_token(gains, mix)
    best = max(known, key=rates.__getitem__)
    if mix.blocked and gains[best] > MIX_MARGIN * costs.decode_fixed_s:
        return Balance(True, best, GAIN, gains)
    return Balance(False, None, _alone(mix), gains)


def _alone(mix: Mix) -> str:
    return NO_GAIN if mix.blocked else PROMPTS_FIRST


def _gains_s(costs: Costs, mix: Mix, chunks: tuple[int, ...]) -> dict[int, float]:
    """Seconds that a mixed step of each budget saves; where it was not measured, that it would if it cost nothing of
    its own."""
    decode_s, per_token = costs.decode_fixed_s * _share(mix), costs.prefill_s_per_token
    return {
        chunk: decode_s
        + costs.compressed_s_per_token * max(chunk - mix.decoding, 0)
        - costs.mixed_s.get(chunk, per_token * chunk)
        for chunk in chunks
    }


def _share(mix: Mix) -> float:
    """Of a decode step of all that will run at once, as much as is worth waiting for."""
    return mix.decoding / max(mix.at_once, mix.decoding, 1) if mix.blocked else 0.0


def _per_token(gains_s: Mapping[int, float], mix: Mix) -> dict[int, float]:
    """Seconds saved for each prompt token: of these there are so many, in however many steps."""
    return {chunk: gain_s / max(chunk - mix.decoding, 1) for chunk, gain_s in gains_s.items()}


def _lasts_s(costs: Costs, mix: Mix, chunk: int) -> float:
    """Where KV bytes were thought dear, as in very small models, a step may seem to take no time without them."""
    return max(costs.mixed_s[chunk] + (costs.decode_s_per_byte or 0.0) * mix.kv_bytes, SHORTEST_S)


def _within(costs: Costs, mix: Mix, limits: Limits, known: tuple[int, ...]) -> Balance:
    """As many tokens as keep a step within the bound, so that prompts wait as little as that allows; more if many wait
    already, or if no step is that short."""
    lasts = {chunk: _lasts_s(costs, mix, chunk) for chunk in known}
    within = _largest(lasts, limits.tpot_s)
    if within is None:
        rates = {chunk: max(chunk - mix.decoding, 0) / seconds for chunk, seconds in lasts.items()}
        fast = min(chunk for chunk, rate in rates.items() if rate >= NEARLY * max(rates.values()))
        return Balance(True, fast, TIGHT, lasts)
    steps = mix.prompt_tokens / max(within - mix.decoding, 1)
    times = max((times for least, times in BACKLOGS if steps > least), default=1.0)
    chunk = _largest(lasts, times * limits.tpot_s)
    return Balance(True, chunk, BACKLOG if chunk > within else WITHIN, lasts)


def _largest(lasts: Mapping[int, float], seconds: float) -> int | None:
    """The most tokens of a step that lasts no longer, None if each does: between two budgets, steps last what lies
    between their times."""
    chunk = max((chunk for chunk, each in lasts.items() if each <= seconds), default=None)
    larger = min((other for other in lasts if chunk is not None and other > chunk), default=None)
    if larger is None:
        return chunk
    share = (seconds - lasts[chunk]) / (lasts[larger] - lasts[chunk])
    return chunk + int(share * (larger - chunk)) // CHUNK_STEP * CHUNK_STEP


def _interpolated(lasts: Mapping[int, float], chunk: int) -> float:
    """Seconds of a step of `chunk` tokens, between those of two budgets."""
    below, above = max(each for each in lasts if each <= chunk), min(each for each in lasts if each >= chunk)
    share = (chunk - below) / max(above - below, 1)
    return lasts[below] + share * (lasts[above] - lasts[below])
