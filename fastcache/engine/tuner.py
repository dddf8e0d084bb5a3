"""Keeps the measured costs of a running engine, asks the policy, and remembers what was decided and why.

Times come from the host's clock when a step's tokens arrive and from device events read at that moment, one step
late: nobody waits for a measurement. Until a cost is known the fixed choice runs; places and mixed steps that
were never tried are tried first, which a warm-up round is there for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from fastcache.core import Sequence, Step
from fastcache.engine.amounts import Amounts, amounts
from fastcache.engine.averages import Plane, Ratio
from fastcache.engine.policy import (
    AFTER,
    INLINE,
    NOT_MEASURED,
    Balance,
    Costs,
    Decision,
    Limits,
    RequestLoad,
    balance,
    cheapest,
    decide,
)
from fastcache.engine.stages import COMPRESS, DECODE, PREFILL, Load, Turn

TRIALS = 3  # observations before a cost counts as measured
MOST_TRIALS = 9
TRIED, NOTHING = "tried, to measure it", "nothing to balance"
CHEAPEST, FIXED_IS_BEST = (
    "adds least to the main stream",
    "no other place adds clearly less to the main stream",
)
# The first steps of a kind compile kernels, and one that captures a graph takes many times as long as the next:
# neither says anything about the device.
UNSEEN, OUTLIER = 2, 4.0
STEP_KINDS = ("prefill", "decode", "mixed")


class Tuner:
    """`copy_bytes_s`: what the device was measured to read and write per second; no KV byte is read faster."""

    deferred = False  # as a stage policy: a step's place says where it compresses

    def __init__(self, limits: Limits, copy_bytes_s: float) -> None:
        self.limits = limits
        self.cuts_prompts = bool(limits.chunks)
        self.may_defer = any(place.startswith(AFTER) for place in limits.places)
        self._decode, self._prefill = Plane(1 / copy_bytes_s), Plane()
        self._exposed = {place: Ratio() for place in limits.places}
        self._mixed = {chunk: Ratio() for chunk in limits.chunks}
        self._trials: Counter[str | int] = Counter()
        self._steps: Counter[str] = Counter()
        self._odd_run = 0
        self._chosen = Balance(False, None, NOTHING)
        self._request: tuple[tuple[str, ...], RequestLoad, Decision] | None = None
        self._load: Load | None = None
        self._late_s = 0.0  # what decode steps took too long while a compression ran beside them
        self._costs: Costs | None = Costs()
        self.predicted = {kind: [0, 0.0, 0.0] for kind in STEP_KINDS}  # steps, predicted and measured seconds
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._first: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            fixed = per_byte = per_token = None
            if self._decode.count >= TRIALS:
                fixed, per_byte = self._decode.solve()
            if self._prefill.count >= TRIALS:
                per_token = self._prefill.solve()[0]
            # A single observation may be below zero, as noise is; a cost is not.
            exposed = {place: max(cost, 0.0) for place, cost in _measured(self._exposed).items()}
            self._costs = Costs(fixed, per_byte, per_token, exposed, _measured(self._mixed))
        return self._costs

    @property
    def measured(self) -> bool:
        """Whether decisions about compression rest on measurements alone."""
        known = self.costs.decode_fixed_s is not None and self.costs.prefill_s_per_token is not None
        return known and self._untried(self._exposed) is None

    # -- decisions ---------------------------------------------------------------------------------------------

    def admit(self, seq: Sequence, kept: int, sharing: int) -> Decision | None:
        """Decide about a request that would be admitted next. None: nothing to compress."""
        self._request = None
        if not kept:
            return None
        request = seq.request
        context = request.compress_at
        load = RequestLoad(
            context, kept, seq.num_tokens - context, request.sampling.max_tokens - seq.num_sampled, sharing
        )
        decision = decide(self.costs, load, self.limits)
        seq.leave_whole = not decision.compress
        choice = "compressed" if decision.compress else "whole"
        self._request = ("compression", choice, decision.reason), load, decision
        return decision

    def admitted(self) -> None:
        """The request decided about last has been admitted; one that must wait is decided about again."""
        if self._request is not None:
            self._note(*self._request)

    def place(self) -> str:
        """Where the contexts that end in the next prefill step are compressed."""
        return self._place()[0]

    def _place(self) -> tuple[str, str]:
        untried, best = self._untried(self._exposed), cheapest(self.costs, self.limits)
        if untried is not None:
            return untried, TRIED
        if best is None:
            return self.limits.places[0], NOT_MEASURED
        return best, CHEAPEST if best != self.limits.places[0] else FIXED_IS_BEST

    def turns(self, load: Load) -> tuple[Turn, ...]:
        """A stage policy (stages.StagePolicy): prompts first, alone or with decoding sequences riding along."""
        self._chosen = chosen = self._balance(load)
        prefill = Turn(PREFILL, max_tokens=chosen.chunk, together=chosen.together)
        return prefill, Turn(COMPRESS), Turn(DECODE)

    def _balance(self, load: Load) -> Balance:
        pending, decoding = load.prefill.pending, load.decode.pending
        if not pending or not decoding:
            return Balance(False, None, NOTHING)
        self._load = load
        untried = self._untried(self._mixed)
        if untried is not None and self.costs.prefill_s_per_token is not None:
            return Balance(True, untried, TRIED)
        return balance(self.costs, self.limits, pending, decoding, load.blocked)

    def _untried(self, ratios: dict[Any, Ratio]) -> Any | None:
        """What still needs a trial; each gets a bounded number of them, whether or not they say anything."""
        untried = (n for n, r in ratios.items() if r.count < TRIALS and self._trials[n] < MOST_TRIALS)
        return next(untried, None)

    def taken(self, step: Step) -> None:
        """A prefill step is being launched as decided: remember why."""
        if any(chunk.kept or chunk.defer for chunk in step.chunks):
            place, reason = self._place()
            self._trials[place] += reason == TRIED
            self._note(("place", place, reason), None, None)
        chosen = self._chosen
        if chosen.reason != NOTHING:
            self._trials[chosen.chunk] += chosen.reason == TRIED
            choice = f"together, {chosen.chunk} tokens" if chosen.together else "prefill alone"
            self._note(("balance", choice, chosen.reason), self._load, chosen)

    def _note(self, key: tuple[str, ...], inputs: Any, outcome: Any) -> None:
        self._counts[key] += 1
        if key not in self._first:
            self._first[key] = {
                "inputs": dataclasses.asdict(inputs) if inputs else None,
                "outcome": dataclasses.asdict(outcome) if outcome else None,
                "costs": dataclasses.asdict(self.costs),
            }

    # -- observations ------------------------------------------------------------------------------------------

    def observe(self, step: Step, elapsed_s: float, compression_s: float, under_way: bool) -> None:
        """A step took `elapsed_s`, of which `compression_s` for compression on its own stream. `under_way`: a
        compression ran beside it."""
        work = amounts(step, self.limits.bytes_per_token)
        decode = self._decode.solve() if self._decode.count else (0.0, 0.0)
        prefill = self._prefill.solve() if self._prefill.count else (0.0, 0.0)
        base = prefill[0] * work.tokens + prefill[1] * work.pairs + decode[1] * work.kv_bytes
        if self._odd(step, elapsed_s, base + decode[0]):
            return
        if step.decode:
            self._observe_decode(work, elapsed_s, decode[0] + base, under_way)
        elif step.decode_rows:
            self._observe_mixed(step, elapsed_s - compression_s, base)
        else:
            self._observe_prefill(step, work, elapsed_s, compression_s, base)
        self._costs = None

    def _odd(self, step: Step, elapsed_s: float, expected_s: float) -> bool:
        """Whether a step's time is the host's doing. Several such times in a row are the device's after all."""
        kind = "decode" if step.decode else "mixed" if step.decode_rows else "prefill"
        self._steps[kind] += 1
        if self._steps[kind] <= UNSEEN:
            return True
        known = min(self._prefill.count if kind != "decode" else TRIALS, self._decode.count) >= TRIALS
        odd = known and elapsed_s > OUTLIER * expected_s and self._odd_run < TRIALS
        self._odd_run = self._odd_run + 1 if odd else 0
        return odd

    def _observe_decode(self, work: Amounts, elapsed_s: float, expected_s: float, under_way: bool) -> None:
        if under_way and self._decode.count >= TRIALS:
            self._late_s += elapsed_s - expected_s
            return
        self._predicted("decode", expected_s, elapsed_s, self._decode.count)
        self._decode.add(1.0, work.kv_bytes, elapsed_s)

    def _observe_mixed(self, step: Step, elapsed_s: float, base_s: float) -> None:
        chunk = next((each for each in self.limits.chunks if each >= step.prefill_tokens), None)
        if chunk is None or not self._prefill.count:
            return
        known = self._mixed[chunk].value
        if known is not None:
            self._predicted("mixed", base_s + known, elapsed_s, TRIALS)
        self._mixed[chunk].add(1.0, elapsed_s - base_s)

    def _observe_prefill(
        self, step: Step, work: Amounts, elapsed_s: float, compression_s: float, base_s: float
    ) -> None:
        place = step.place or self.limits.places[0]
        on_main = place == INLINE
        if work.compressed and place in self._exposed and not place.startswith(AFTER):
            exposed = compression_s if on_main else elapsed_s - base_s
            if on_main or self._prefill.count >= TRIALS:
                self._exposed[place].add(work.compressed, exposed)
        if on_main or not work.compressed:
            self._predicted("prefill", base_s + compression_s, elapsed_s, self._prefill.count)
            self._prefill.add(work.tokens, work.pairs, max(elapsed_s - compression_s, 0.0))

    def waited(self, seconds: float) -> None:
        """Nothing could be computed for so long but the compression under way."""
        self._late_s += seconds

    def job_done(self, tokens: int) -> None:
        """A compression beside decode steps, over `tokens` context tokens, is complete."""
        for place, ratio in self._exposed.items():
            if place.startswith(AFTER):
                ratio.add(tokens, self._late_s)
                self._costs = None
        self._late_s = 0.0

    def _predicted(self, kind: str, expected_s: float, elapsed_s: float, known: int) -> None:
        if known >= TRIALS:
            entry = self.predicted[kind]
            entry[0] += 1
            entry[1] += expected_s
            entry[2] += elapsed_s

    # -- report ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was decided, not what was measured."""
        self._counts.clear()
        self._first.clear()
        self.predicted = {kind: [0, 0.0, 0.0] for kind in STEP_KINDS}

    def report(self) -> dict[str, Any]:
        """Decisions with their count and the first one's inputs; costs now; predicted and measured step times."""
        return {
            "decisions": [
                {"about": key[0], "choice": key[1], "reason": key[2], "count": count, **self._first[key]}
                for key, count in self._counts.most_common()
            ],
            "measured": self.measured,
            "costs": dataclasses.asdict(self.costs),
            "places": list(self.limits.places),
            "steps": {
                kind: {"count": n, "predicted_s": expected, "measured_s": measured}
                for kind, (n, expected, measured) in self.predicted.items()
            },
        }


def _measured(ratios: dict[Any, Ratio]) -> dict[Any, float]:
    return {name: ratio.value for name, ratio in ratios.items() if ratio.count >= TRIALS}
