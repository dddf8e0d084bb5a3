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
# A mixed step may cost this share of its prefill without gaining anything back: the price of not making decoding
# sequences wait for a whole prompt.
LATENCY_SHARE = 0.01
# Places whose costs differ by less than this share of the prefill itself cannot be told apart.
PLACE_MARGIN = 0.003
# Requests come in a trickle, not in a burst, while at most one waits for so many that decode.
TRICKLE = 4


@dataclass(frozen=True)
class Costs:
    """Measured on this device in this run. `exposed`: seconds per context token that compression adds to the main
    stream, by place. `mixed_s`: seconds of a mixed step beyond its prefill tokens and its KV bytes, by its prefill
    budget; `decode_fixed_s` is the same of a decode step."""

    decode_fixed_s: float | None = None
    decode_s_per_byte: float | None = None
    prefill_s_per_token: float | None = None
    exposed: Mapping[str, float] = field(default_factory=dict)
    mixed_s: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What the device and the configuration allow. `places`: where compression may run, the fixed choice first;
    a place with a partition is one that was granted. `chunks`: prefill budgets a mixed step may have, ascending."""

    max_seqs: int
    pool_bytes: int
    bytes_per_token: int
    places: tuple[str, ...] = (INLINE,)
    chunks: tuple[int, ...] = ()


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
class Balance:
    """How the next prefill shares the GPU with decoding sequences: together in steps of `chunk` tokens, or not."""

    together: bool
    chunk: int | None
    reason: str


NOT_MEASURED = "not measured yet: the fixed choice"
PAYS, TOO_DEAR = "compression pays", "compression costs more than these outputs give back"
GAIN, CALM, BURST = "mixed steps save decode steps", "mixed steps for latency", "a burst: prefill first"
NO_GAIN = "a mixed step costs more than the decode step it saves"


def decide(costs: Costs, load: RequestLoad, limits: Limits) -> Decision:
    """Whether to compress this request's context, and where."""
    known = {place: costs.exposed[place] for place in limits.places if place in costs.exposed}
    if costs.decode_fixed_s is None or costs.decode_s_per_byte is None or not known:
        return Decision(True, limits.places[0], NOT_MEASURED)
    place = cheapest(costs, limits)
    predicted = {"whole": _decode_s(costs, load, limits, load.context)}
    kept = _decode_s(costs, load, limits, load.kept)
    predicted |= {name: load.context * seconds + kept for name, seconds in known.items()}
    pays = predicted[place] < predicted["whole"]
    point = break_even(costs, load, limits, place)
    return Decision(pays, place, PAYS if pays else TOO_DEAR, predicted, point)


def cheapest(costs: Costs, limits: Limits) -> str | None:
    """The place that adds least to the main stream; None if none was measured. The fixed choice stays unless another
    is better by more than the times of two equal steps differ."""
    known = {place: costs.exposed[place] for place in limits.places if place in costs.exposed}
    if not known:
        return None
    best, first = min(known, key=known.__getitem__), next(iter(known))
    margin = PLACE_MARGIN * (costs.prefill_s_per_token or 0.0)
    return best if known[first] - known[best] > margin else first


def break_even(costs: Costs, load: RequestLoad, limits: Limits, place: str) -> float | None:
    """Output tokens from which compressing at `place` pays; None if it never does.

    Exact while memory does not limit how many sequences share a step; where it does, the saving per token only grows
    with the output, so the requested output's own saving is used.
    """
    steps = max(load.output - 1, 1)
    saving = (
        _decode_s(costs, load, limits, load.context, steps) - _decode_s(costs, load, limits, load.kept, steps)
    ) / steps
    return 1 + load.context * costs.exposed[place] / saving if saving > 0 else None


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


def balance(costs: Costs, limits: Limits, pending: int, decoding: int, blocked: bool) -> Balance:
    """How the next prefill runs. `pending` requests wait or are in prefill, `decoding` sequences would ride along;
    `blocked`: some must wait for a running one to end.

    A mixed step saves a decode step's fixed part and costs its own. The saving is real only if decode steps are what
    the rest waits for: while requests are blocked or trickle in. In a burst that fits, the last prompt's tokens all
    come after it, whoever rode along before.
    """
    if costs.decode_fixed_s is None or costs.prefill_s_per_token is None:
        return Balance(False, None, NOT_MEASURED)
    known = [chunk for chunk in limits.chunks if chunk in costs.mixed_s]
    if not decoding or not known:
        return Balance(False, None, BURST if not decoding else NOT_MEASURED)
    steady = blocked or TRICKLE * pending <= decoding
    gain = {
        chunk: ((costs.decode_fixed_s if steady else 0.0) - costs.mixed_s[chunk]) / chunk for chunk in known
    }
    best = max(known, key=gain.__getitem__)
    if gain[best] > 0:
        return Balance(True, best, GAIN)
    calm = [chunk for chunk in known if gain[chunk] >= -LATENCY_SHARE * costs.prefill_s_per_token]
    return Balance(True, calm[0], CALM) if calm else Balance(False, None, NO_GAIN if steady else BURST)
