"""What pays on this device, from what was measured on it: compress or not, where, and how prefill and decode share
a step. Pure functions of numbers; no clock, no tensor.

Times are seconds of the main stream, the resource everybody waits for. Costs that have not been measured are None,
and then the decision is the fixed one and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Where a context is compressed: behind each layer's prefill on the main stream, beside it on the compression stream, or
# after it, beside decode steps. `beside` and `after` carry the SMs of their partition: "beside:16".
INLINE, BESIDE, AFTER = "inline", "beside", "after"
# Places whose costs differ by less than this share of the prefill itself cannot be told apart: so much does the time
# of equal steps vary with the device's clock.
PLACE_MARGIN = 0.01
# A mixed step must gain more than this share of the decode step it replaces, for the same reason.
MIX_MARGIN = 0.2
# Compression must give back more than this share of a request's prefill, for the same reason.
PAYS_MARGIN = 0.01
PROBE = 1  # the budget, by number, that tells whether mixed steps can pay at all
# Prefill tokens of a mixed step that is made to last a given time are a multiple of this.
CHUNK_STEP = 64
# Where TPOT is bounded: prompts that would take more steps than this come before the bound, in the smallest step that
# computes them nearly as fast as any that lasts up to so many times the bound.
BACKLOG_STEPS, NEARLY, LONG_STEP = 10, 0.8, 4.0


@dataclass(frozen=True)
class Costs:
    """Measured on this device. `exposed`: seconds per context token that compression adds to the main stream, by place.
    `mixed_s`: seconds of a mixed step beyond the KV bytes that its decoding rows read, by its prefill budget;
    `decode_fixed_s`: the same of a decode step. A row that decodes costs a token's product in a mixed step, and nothing
    in a decode step, which waits for the weights."""

    decode_fixed_s: float | None = None
    decode_s_per_byte: float | None = None
    prefill_s_per_token: float | None = None
    exposed: Mapping[str, float] = field(default_factory=dict)
    mixed_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What the device and the configuration allow. `places`: where compression may run, the fixed choice first;
    a place with a partition is one that was granted. `chunks`: prefill budgets a mixed step may have, ascending.
    `tpot_s`: seconds that a sequence may wait between two tokens; None if only throughput counts."""

    max_seqs: int
    pool_bytes: int
    bytes_per_token: int
    places: tuple[str, ...] = (INLINE,)
    chunks: tuple[int, ...] = ()
    tpot_s: float | None = None


@dataclass(frozen=True)
class RequestLoad:
    """One request about to be admitted: tokens of its context, entries kept of it, tokens after it, tokens to
    generate; `sharing` sequences want to decode together with it."""

    context: int
    kept: int
    rest: int
    output: int
    sharing: int


@dataclass(frozen=True)
class Decision:
    """`predicted`: seconds of the main stream that each alternative costs this request, "whole" being no compression.
    `break_even`: output tokens from which compression pays, None if it never does or is not known."""

    compress: bool
    place: str
    reason: str
    predicted: Mapping[str, float] = field(default_factory=dict)
    break_even: float | None = None


@dataclass(frozen=True)
class Mix:
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
    """How the next prefill shares the GPU with decoding sequences: together in steps of `chunk` tokens, or not.
    `predicted`: by prefill budget, seconds that a mixed step saves, or, where TPOT is bounded, lasts."""

    together: bool
    chunk: int | None
    reason: str
    predicted: Mapping[int, float] = field(default_factory=dict)


NOT_MEASURED = "not measured yet: the fixed choice"
PAYS, TOO_DEAR = "compression pays", "compression costs more than these outputs give back"
TOO_LITTLE = "compression would give back less than a hundredth of the prefill"
GAIN, NO_GAIN = "mixed steps save decode steps", "a mixed step costs more than the decode step it saves"
PROMPTS_FIRST = "no request waits for decode steps: prompts first"
WITHIN = "the largest mixed step within the bound on TPOT"
TIGHT = "no mixed step is within the bound on TPOT: the smallest that is nearly as fast as any"
BACKLOG = (
    "many prompts wait, which come before the bound on TPOT: the smallest step that is nearly as fast as any"
)


def decide(costs: Costs, load: RequestLoad, limits: Limits) -> Decision:
    """Whether to compress this request's context, and where."""
    known = {place: costs.exposed[place] for place in limits.places if place in costs.exposed}
    place = cheapest(costs, limits)
    if costs.decode_fixed_s is None or costs.decode_s_per_byte is None or place is None:
        return Decision(True, limits.places[0], NOT_MEASURED)
    predicted = {"whole": _decode_s(costs, load, limits, load.context)}
    kept = _decode_s(costs, load, limits, load.kept)
    predicted |= {name: load.context * seconds + kept for name, seconds in known.items()}
    gain = predicted["whole"] - predicted[place]
    pays = gain > _margin_s(costs, load)
    reason = PAYS if pays else TOO_LITTLE if gain > 0 else TOO_DEAR
    return Decision(pays, place, reason, predicted, break_even(costs, load, limits, place))


def _margin_s(costs: Costs, load: RequestLoad) -> float:
    """Seconds that compression must gain to be told from none."""
    return PAYS_MARGIN * load.context * (costs.prefill_s_per_token or 0.0)


def cheapest(costs: Costs, limits: Limits) -> str | None:
    """The place that adds least to the main stream. The fixed choice stays unless another is better by more than the
    times of two equal steps differ; None while the fixed one was not measured, which no other can be held against."""
    known = {place: costs.exposed[place] for place in limits.places if place in costs.exposed}
    first = limits.places[0] if limits.places else None
    if first not in known:
        return None
    best = min(known, key=known.__getitem__)
    margin = PLACE_MARGIN * (costs.prefill_s_per_token or 0.0)
    return best if known[first] - known[best] > margin else first


def break_even(costs: Costs, load: RequestLoad, limits: Limits, place: str) -> float | None:
    """Output tokens from which compressing at `place` pays, its margin included; None if it never does.

    Exact while memory does not limit how many sequences share a step; where it does, the saving per token only grows
    with the output, so the requested output's own saving is used.
    """
    steps = max(load.output - 1, 1)
    saving = (
        _decode_s(costs, load, limits, load.context, steps) - _decode_s(costs, load, limits, load.kept, steps)
    ) / steps
    price = load.context * costs.exposed[place] + _margin_s(costs, load)
    return 1 + price / saving if saving > 0 else None


def _decode_s(
    costs: Costs, load: RequestLoad, limits: Limits, stored: int, steps: int | None = None
) -> float:
    """Seconds of all decode steps that are this request's: its share of each step's fixed part, and its KV bytes.

    The first token comes from prefill. As many sequences share a step as want to, are allowed to and fit the pool.
    """
    steps = max(load.output - 1, 0) if steps is None else steps
    entries = stored + load.rest
    largest = (entries + steps) * limits.bytes_per_token
    share = max(1 / max(1, min(load.sharing, limits.max_seqs)), largest / limits.pool_bytes)
    mean = (entries + steps / 2) * limits.bytes_per_token
    return steps * (costs.decode_fixed_s * share + costs.decode_s_per_byte * mean)


def worth_trying(costs: Costs, limits: Limits, mix: Mix) -> tuple[int, ...]:
    """Prefill budgets that may be taken once they are measured.

    For throughput, those that would gain if a mixed step cost nothing of its own. One of them is tried first: what the
    others cost is much like it, and every trial breaks up what would have been prefilled together. Where TPOT is
    bounded, from the smallest on up to the first that is too long.
    """
    if costs.decode_fixed_s is None or not costs.prefill_s_per_token:
        return ()
    if limits.tpot_s is None:
        probe = limits.chunks[PROBE : PROBE + 1] or limits.chunks
        gain = max((_gain_s(costs, mix, chunk) for chunk in probe), default=0.0)
        if not mix.blocked or gain <= MIX_MARGIN * costs.decode_fixed_s:
            return ()
        return limits.chunks if all(chunk in costs.mixed_s for chunk in probe) else probe
    within = _up_to(costs, limits, mix, limits.tpot_s)
    if within and mix.prompt_tokens <= BACKLOG_STEPS * within[-1]:
        return within
    return _up_to(costs, limits, mix, LONG_STEP * limits.tpot_s)


def _up_to(costs: Costs, limits: Limits, mix: Mix, seconds: float) -> tuple[int, ...]:
    """Budgets whose steps last no longer, and the next larger one, which has to be measured to be told from them."""
    known = [chunk in costs.mixed_s and _lasts_s(costs, mix, chunk) <= seconds for chunk in limits.chunks]
    return limits.chunks[: known.index(False) + 1] if False in known else limits.chunks


def balance(costs: Costs, limits: Limits, mix: Mix) -> Balance:
    """How the next prefill runs while sequences decode: for throughput, or within a bound on the time between tokens.

    A mixed step reads the weights once for both, so it takes the place of a decode step and of its tokens' share of a
    prefill. The saving is real only if decode steps are what the rest waits for,
    and then a step saves as much as it has rows of all that will run at once. In a burst that fits, the last
    prompt's tokens all come after it, whoever rode along before.
    """
    if costs.decode_fixed_s is None or not costs.prefill_s_per_token:
        return Balance(False, None, NOT_MEASURED)
    known = {chunk: costs.mixed_s[chunk] for chunk in limits.chunks if chunk in costs.mixed_s}
    if not known:
        return Balance(False, None, NOT_MEASURED if worth_trying(costs, limits, mix) else _alone(mix))
    if limits.tpot_s is not None:
        return _within(costs, mix, limits, known)
    gains = {chunk: _gain_s(costs, mix, chunk) for chunk in known}
    best = max(known, key=lambda chunk: gains[chunk] / chunk)
    if mix.blocked and gains[best] > MIX_MARGIN * costs.decode_fixed_s:
        return Balance(True, best, GAIN, gains)
    return Balance(False, None, _alone(mix), gains)


def _alone(mix: Mix) -> str:
    return NO_GAIN if mix.blocked else PROMPTS_FIRST


def _gain_s(costs: Costs, mix: Mix, chunk: int) -> float:
    """Seconds that a mixed step saves; where it was not measured, that it would if it cost nothing of its own."""
    share = mix.decoding / max(mix.at_once, mix.decoding, 1) if mix.blocked else 0.0
    per_token = costs.prefill_s_per_token
    apart = costs.decode_fixed_s * share + (per_token + min(costs.exposed.values(), default=0.0)) * chunk
    return apart - costs.mixed_s.get(chunk, per_token * (chunk + mix.decoding))


def _lasts_s(costs: Costs, mix: Mix, chunk: int) -> float:
    return costs.mixed_s[chunk] + (costs.decode_s_per_byte or 0.0) * mix.kv_bytes


def _within(costs: Costs, mix: Mix, limits: Limits, known: Mapping[int, float]) -> Balance:
    """As many prefill tokens as keep a step within the bound, so that prompts wait as little as that allows; unless too
    many wait already, or no step is that short. Between two budgets, steps last what lies between their times."""
    lasts = {chunk: _lasts_s(costs, mix, chunk) for chunk in sorted(known)}
    best = max(chunk / seconds for chunk, seconds in lasts.items())
    fast = min(chunk for chunk, seconds in lasts.items() if chunk / seconds >= NEARLY * best)
    chunk = max((chunk for chunk, seconds in lasts.items() if seconds <= limits.tpot_s), default=None)
    if chunk is None:
        return Balance(True, fast, TIGHT, lasts)
    larger = min((other for other in lasts if other > chunk), default=None)
    fitting = chunk
    if larger is not None:
        share = (limits.tpot_s - lasts[chunk]) / (lasts[larger] - lasts[chunk])
        fitting += int(share * (larger - chunk)) // CHUNK_STEP * CHUNK_STEP
    if mix.prompt_tokens > BACKLOG_STEPS * fitting and fast > fitting:
        return Balance(True, fast, BACKLOG, lasts)
    return Balance(True, fitting, WITHIN, lasts)
