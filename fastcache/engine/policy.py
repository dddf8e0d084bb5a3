"""What pays on this device, from what was measured on it: compress or not, and where; `balance.py` says how prefill and
decode share a step. Pure functions of numbers; no clock, no tensor.

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
# Compression must give back more than this share of a request's prefill, for the same reason.
PAYS_MARGIN = 0.01


@dataclass(frozen=True)
class Costs:
    """Measured on this device. `exposed`: seconds per context token that compression adds to the main stream, by place;
    `seen_tokens`: how many were compressed in the largest step that this was seen in.
    `mixed_s`: seconds of a mixed step beyond the KV bytes that its decoding rows read, by its budget of tokens;
    `decode_fixed_s`: the same of a decode step. By SM split, for those that were measured on both sides:
    `aside_s_per_token` of a prefill beside decode steps, its compression included, and `beside`, how many times as long
    a decode step lasts beside it."""

    decode_fixed_s: float | None = None
    decode_s_per_byte: float | None = None
    prefill_s_per_token: float | None = None
    exposed: Mapping[str, float] = field(default_factory=dict)
    mixed_s: Mapping[int, float] = field(default_factory=dict)
    seen_tokens: Mapping[str, int] = field(default_factory=dict)
    aside_s_per_token: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def compressed_s_per_token(self) -> float:
        """Of a prefill on the whole GPU, compressed where that adds least; its price must be known."""
        return self.prefill_s_per_token + min(self.exposed.values(), default=0.0)


@dataclass(frozen=True)
class Limits:
    """What the device and the configuration allow. `places`: where compression may run, the fixed choice first;
    a place with a partition is one that was granted. `chunks`: tokens a mixed step may have, ascending, of prompts and
    of decoding rows together: it is their number that the products' tiles fit. `splits`: of the SMs, by name, of
    which prefill can have one side and decode the other.
    `tpot_s`: seconds that a sequence may wait between two tokens; None if only throughput counts."""

    max_seqs: int
    pool_bytes: int
    bytes_per_token: int
    places: tuple[str, ...] = (INLINE,)
    chunks: tuple[int, ...] = ()
    splits: tuple[str, ...] = ()
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


NOT_MEASURED = "not measured yet: the fixed choice"
PAYS, TOO_DEAR = "compression pays", "compression costs more than these outputs give back"
TOO_LITTLE = "compression would give back less than a hundredth of the prefill"


def decide(costs: Costs, load: RequestLoad, limits: Limits) -> Decision:
    """Whether to compress this request's context, and where."""
    known = {place: costs.exposed[place] for place in limits.places if place in costs.exposed}
    place = cheapest(costs, limits, load.context)
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


def cheapest(costs: Costs, limits: Limits, tokens: int) -> str | None:
    """The place that adds least to the main stream where `tokens` of contexts are compressed in one step. The fixed
    choice stays unless another is better by more than the times of two equal steps differ, and was seen in a step
    nearly as large; None while the fixed one was not measured, which no other can be held against."""
    first = limits.places[0] if limits.places else None
    known = {
        place: costs.exposed[place]
        for place in limits.places
        if place in costs.exposed and (place == first or seen_nearly(costs, place, tokens))
    }
    if first not in known:
        return None
    best = min(known, key=known.__getitem__)
    margin = PLACE_MARGIN * (costs.prefill_s_per_token or 0.0)
    return best if known[first] - known[best] > margin else first


def seen_nearly(costs: Costs, place: str, tokens: int) -> bool:
    """What compression adds beside a small prefill says little of a large one, whose kernels fill the device."""
    return 4 * costs.seen_tokens.get(place, tokens) >= 3 * tokens


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
