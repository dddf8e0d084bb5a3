"""What steps were observed to take, as the costs that decisions are made from.

Times come from the host's clock when a step's tokens arrive and from device events read at that moment, one step late:
nobody waits for a measurement.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastcache.core import Step
from fastcache.engine.amounts import Amounts, amounts
from fastcache.engine.averages import Middle, Plane, Ratio, Sides
from fastcache.engine.policy import AFTER, INLINE, Costs, Limits
from fastcache.engine.side_by_side import LEAST_TOKENS

TRIALS = 3  # observations before a cost counts as measured
# The first steps of a kind compile kernels, and one that captures a graph takes many times as long as the next:
# neither says anything about the device.
UNSEEN, OUTLIER = 2, 4.0
# Prefill steps of one size compressed inline, before another place is held against them; sizes that are remembered.
ALIKE, MOST_SIZES = 2, 64
# Costs follow what is observed: at once while little is known, then, as averages move slowly, every eighth step.
SETTLED, REFRESH = 64, 8
PREFILLS = 33  # whose compression is remembered: small ones between large ones must not push those out
# What is predicted: prefills, decode and mixed steps alone; prefills on one side of a split, decode steps beside them.
STEP_KINDS = ("prefill", "decode", "mixed", "aside", "beside")


@dataclass(frozen=True)
class KnownCosts:
    """Measured before, as `fastcache cost` writes it: a prefill step of `sequences` contexts of `context` tokens took
    `prefill_s`, and compressing them inside it `inline_s`, of which neither includes the other."""

    sequences: int
    context: int
    prefill_s: float
    inline_s: float


class Observed:
    """`copy_bytes_s`: what the device was measured to read and write per second; no KV byte is read faster."""

    def __init__(self, limits: Limits, copy_bytes_s: float) -> None:
        self.limits = limits
        self._decode, self._prefill, self._mean = Plane(1 / copy_bytes_s), Plane(), Ratio()
        self.exposed = {place: Middle(PREFILLS) for place in limits.places}
        self._seen_tokens: dict[str, int] = {}
        self.mixed = {chunk: Middle() for chunk in limits.chunks}
        self.sides = {split: Sides() for split in limits.splits}
        self._alike: dict[Amounts, Middle] = {}
        self.kv_bytes = 0.0  # that the last step with decoding sequences read
        self._steps: Counter[str] = Counter()
        self._observed = 0
        self._odd_run: Counter[str] = Counter()
        self._late_s = 0.0  # what steps took too long while a compression ran beside them
        self._done_tokens = 0  # of compressions that ended while the step observed next was running
        self._costs: Costs | None = Costs()
        self.predicted = {kind: [0, 0.0, 0.0] for kind in STEP_KINDS}  # steps, predicted and measured seconds

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            fixed = per_byte = per_token = None
            if self._decode.count >= TRIALS:
                fixed, per_byte = self._decode.solve()
            if self._prefill.count >= TRIALS:
                per_token = self._mean.value
            exposed = {
                place: self._exposed_s(place) for place, seen in self.exposed.items() if seen.count >= TRIALS
            }
            seen, mixed = dict(self._seen_tokens), _measured(self.mixed)
            known = {name: sides for name, sides in self.sides.items() if sides.count >= TRIALS}
            aside = {name: sides.prefill.value for name, sides in known.items()}
            beside = {name: sides.decode.value for name, sides in known.items()}
            self._costs = Costs(fixed, per_byte, per_token, exposed, mixed, seen, aside, beside)
        return self._costs

    def _exposed_s(self, place: str) -> float:
        """Per token. A single observation may be below zero, as noise is; a cost is not."""
        seen = self.exposed[place]
        return max(seen.value, 0.0) if seen.count >= TRIALS else 0.0

    def know(self, known: KnownCosts) -> None:
        """Begin with what was measured before; own observations outweigh it as they come."""
        tokens = known.sequences * known.context
        for _ in range(TRIALS):
            self._prefill.add(tokens, tokens * known.context / 2, known.prefill_s)
            self._mean.add(tokens, known.prefill_s)
            if INLINE in self.exposed:
                self.exposed[INLINE].add(tokens, known.inline_s)
        self._costs = None

    def observe(self, step: Step, elapsed_s: float, compression_s: float, under_way: bool) -> float:
        """`elapsed_s`: from this step's launch, or from the end of the step before it if that came later.
        `compression_s`: of its compression in the main stream, where that was timed. `under_way`: compressions
        ran beside it. Returns how much longer it took than the same work done in the ways known best, 0 without any."""
        work = amounts(step, self.limits.bytes_per_token)
        if work.kv_bytes:
            self.kv_bytes = work.kv_bytes
        decode = self._decode.solve() if self._decode.count else (0.0, 0.0)
        prefill = self._prefill.solve() if self._prefill.count else (0.0, 0.0)
        base = prefill[0] * work.tokens + prefill[1] * work.pairs + decode[1] * work.kv_bytes
        if self._odd(step, elapsed_s, base + decode[0]):
            return 0.0
        if step.split is None and self._beside(step, under_way, elapsed_s, base + compression_s, decode):
            return 0.0
        if step.split is not None:
            seen, lost = self._observe_sides(step, work, elapsed_s, decode[0] + base), 0.0
        elif step.decode:
            self._observe_decode(work, elapsed_s, decode[0] + base)
            seen, lost = self._decode.count, 0.0
        elif step.decode_rows:
            seen = self._observe_mixed(work.tokens, elapsed_s, decode[1] * work.kv_bytes)
            lost = elapsed_s - compression_s - base - decode[0]
        else:
            known = self._prefill.count >= TRIALS
            seen = self._observe_prefill(step, work, elapsed_s, compression_s, base)
            inline = self._exposed_s(self.limits.places[0]) if work.compressed else 0.0
            lost = elapsed_s - base - inline * work.compressed if known else 0.0
        self._observed += 1
        if seen <= TRIALS or self._observed < SETTLED or self._observed % REFRESH == 0:
            self._costs = None
        return lost

    def _odd(self, step: Step, elapsed_s: float, expected_s: float) -> bool:
        """Whether a step's time is the host's doing. Several such times of a kind in a row are the device's."""
        kind = "decode" if step.decode else "mixed" if step.decode_rows else "prefill"
        kind += step.split or ""
        self._steps[kind] += 1
        if self._steps[kind] <= UNSEEN:
            return True
        known = min(TRIALS if step.decode else self._prefill.count, self._decode.count) >= TRIALS
        odd = known and elapsed_s > OUTLIER * expected_s and self._odd_run[kind] < TRIALS
        self._odd_run[kind] = self._odd_run[kind] + 1 if odd else 0
        return odd

    def _beside(
        self, step: Step, under_way: bool, elapsed_s: float, base_s: float, decode: tuple[float, float]
    ) -> bool:
        """Whether a compression ran beside this step, which then says nothing of steps alone: what it took longer is
        the compression's. `base_s`: of its tokens, KV bytes and its own compression; decode: see `Costs`."""
        beside = bool(under_way or self._done_tokens)
        known = self._decode.count if step.decode else self._prefill.count
        if not beside or known < TRIALS:
            return False
        expected = base_s + (decode[0] if step.decode else 0.0)
        if step.decode_rows:
            chunk = self._budget(step.num_tokens)
            whole = None if chunk is None else self.mixed[chunk].value
            read = decode[1] * amounts(step, self.limits.bytes_per_token).kv_bytes
            expected = base_s + decode[0] if whole is None else whole + read
        self._late_s += elapsed_s - expected
        if self._done_tokens:
            for place, middle in self.exposed.items():
                if place.startswith(AFTER):
                    middle.add(self._done_tokens, self._late_s)
            self._late_s, self._done_tokens, self._costs = 0.0, 0, None
        return True

    def _observe_decode(self, work: Amounts, elapsed_s: float, expected_s: float) -> None:
        self._predicted("decode", expected_s, elapsed_s, self._decode.count)
        self._decode.add(1.0, work.kv_bytes, elapsed_s)

    def _observe_mixed(self, tokens: int, elapsed_s: float, read_s: float) -> int:
        """read_s: of the KV bytes. A step that is a little smaller than its budget is taken for as much shorter as lies
        between its budget and the next smaller one. Returns how many steps of the budget were seen."""
        chunk = self._budget(tokens)
        if chunk is None or not tells(chunk, tokens):
            return TRIALS + 1
        known = self.mixed[chunk].value
        smaller = max((each for each in self.limits.chunks if each < chunk), default=None)
        less_s = 0.0
        if known is not None and smaller is not None and self.mixed[smaller].count >= TRIALS:
            slope = max(known - self.mixed[smaller].value, 0.0) / (chunk - smaller)
            less_s = slope * (chunk - tokens)
        if known is not None:
            self._predicted("mixed", known + read_s - less_s, elapsed_s, TRIALS)
        self.mixed[chunk].add(1.0, elapsed_s - read_s + less_s)
        return self.mixed[chunk].count

    def _observe_sides(self, step: Step, work: Amounts, elapsed_s: float, alone_s: float) -> int:
        """A prefill on one side of a split, or a decode step beside it that takes `alone_s` on the whole GPU. Returns
        how often both were seen."""
        sides = self.sides[step.split]
        if step.decode:
            kind, middle, amount = "beside", sides.decode, alone_s
            tells_it = self._decode.count >= TRIALS
        else:
            kind, middle, amount = "aside", sides.prefill, work.tokens
            tells_it = work.tokens >= LEAST_TOKENS
        if sides.count >= TRIALS:
            self._predicted(kind, middle.value * amount, elapsed_s, TRIALS)
        if tells_it:
            middle.add(amount, elapsed_s)
        return sides.count

    def _budget(self, tokens: int) -> int | None:
        """The smallest budget that holds so many tokens."""
        return next((chunk for chunk in self.limits.chunks if chunk >= tokens), None)

    def _observe_prefill(
        self, step: Step, work: Amounts, elapsed_s: float, compression_s: float, base_s: float
    ) -> int:
        """Returns how many prefills, or, of those that compress, of this place, were seen."""
        seen = self._prefill.count + 1
        place = step.place or INLINE  # without a method nothing is compressed anywhere
        on_main = place == INLINE
        if work.compressed and place in self.exposed and not place.startswith(AFTER):
            exposed = compression_s if on_main else self._beyond_alike(work, elapsed_s, base_s)
            if exposed is not None:
                self.exposed[place].add(work.compressed, exposed)
                self._seen_tokens[place] = max(self._seen_tokens.get(place, 0), work.compressed)
                seen = min(seen, self.exposed[place].count)
            if on_main:
                self._alike_of(work).add(1.0, elapsed_s)
        if on_main or not work.compressed:
            alone_s = max(elapsed_s - compression_s, 0.0)
            self._predicted("prefill", base_s + compression_s, elapsed_s, self._prefill.count)
            self._prefill.add(work.tokens, work.pairs, alone_s)
            self._mean.add(work.tokens, alone_s)
        return seen

    def _beyond_alike(self, work: Amounts, elapsed_s: float, base_s: float) -> float | None:
        """What compressing beside the prefill added to it. Prefills of different sizes differ by more than that, so
        the step is held against others like it in which the same was compressed inline; where a split binds there are
        none, and `base_s`, of its tokens, must do. None if too little is known."""
        if INLINE not in self.exposed:
            return elapsed_s - base_s if self._prefill.count >= TRIALS else None
        inline, alike = self.exposed[INLINE], self._alike_of(work)
        if alike.count < ALIKE or inline.value is None:
            return None
        return inline.value * work.compressed + elapsed_s - alike.value

    def _alike_of(self, work: Amounts) -> Middle:
        """Seconds of prefill steps of the same size whose contexts are compressed inline; the latest sizes."""
        if work not in self._alike and len(self._alike) == MOST_SIZES:
            del self._alike[next(iter(self._alike))]
        return self._alike.setdefault(work, Middle())

    def waited(self, seconds: float) -> None:
        """Nothing could be computed for so long but the compression under way."""
        self._late_s += seconds

    def job_done(self, tokens: int) -> None:
        """A compression beside other steps, over `tokens` context tokens, is complete. The step that is running has not
        been observed yet."""
        self._done_tokens += tokens

    def _predicted(self, kind: str, expected_s: float, elapsed_s: float, known: int) -> None:
        if known >= TRIALS:
            entry = self.predicted[kind]
            entry[0] += 1
            entry[1] += expected_s
            entry[2] += elapsed_s

    def reset(self) -> None:
        """Forget what was predicted, not what was measured."""
        self.predicted = {kind: [0, 0.0, 0.0] for kind in STEP_KINDS}


def tells(chunk: int, tokens: int) -> bool:
    """Whether a step of `tokens` tells what one with a budget of `chunk` costs: the last piece of a prompt may be
    small."""
    return 4 * tokens >= 3 * chunk


def _measured(costs: dict) -> dict:
    return {name: cost.value for name, cost in costs.items() if cost.count >= TRIALS}
