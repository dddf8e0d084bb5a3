"""Asks the policy with the costs observed so far, and remembers what was decided and why.

Until a cost is known the fixed choice runs. Places and mixed steps that could pay are tried, to measure them, as long
as trying has cost less than a small share of the run; a warm-up round is there for that.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from typing import Any

from fastcache.core import Sequence, Step
from fastcache.engine import side_by_side
from fastcache.engine.balance import Balance, Mix, balance, worth_trying
from fastcache.engine.observed import TRIALS, Observed, tells
from fastcache.engine.policy import (
    AFTER,
    BESIDE,
    NOT_MEASURED,
    PLACE_MARGIN,
    Decision,
    Limits,
    RequestLoad,
    cheapest,
    decide,
    seen_nearly,
)
from fastcache.engine.stages import COMPRESS, DECODE, PREFILL, Load, Turn

# A trial may come to nothing: the first steps of a kind, and those that the host held up, are not observed.
MOST_TRIALS = 16
# Trying may cost this share of the time that the engine has run.
TRYING_SHARE = 0.01
TRIED, NOTHING = "tried, to measure it", "nothing to balance"
LATER = Turn(COMPRESS), Turn(DECODE)
CHEAPEST, FIXED_IS_BEST = (
    "adds least to the main stream",
    "no other place adds clearly less to the main stream",
)
NOT_SEEN = "what another place adds was seen in smaller steps alone"


class Tuner:
    """`copy_bytes_s`: what the device was measured to read and write per second."""

    deferred, by_age = False, False  # as a stage policy: a step's place says where it compresses

    def __init__(self, limits: Limits, copy_bytes_s: float) -> None:
        self.limits, self.observed = limits, Observed(limits, copy_bytes_s)
        self.cuts_prompts = bool(limits.chunks or limits.splits)
        self.may_defer = any(place.startswith(AFTER) for place in limits.places)
        self._trials: Counter[str | int] = Counter()
        self._tried: deque[bool] = deque()  # of launched steps with prompts, whether they are trials
        self.freely = False  # whether trying may cost what it likes
        self._ran_s = self._lost_s = 0.0
        self._chosen = Balance(False, None, NOTHING)
        self._ahead = 0  # tokens that the next prefill may have
        self._placed = (limits.places[0] if limits.places else "", NOT_MEASURED)  # what `place` said last
        self._request: tuple[tuple[str, ...], RequestLoad, Decision] | None = None
        self._mix: Mix | None = None
        self._balanced, self._balanced_with = self._chosen, None
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._first: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def measured(self) -> bool:
        """Whether decisions about compression rest on measurements alone."""
        costs = self.observed.costs
        known = costs.decode_fixed_s is not None and costs.prefill_s_per_token is not None
        return known and self._untried_place() is None

    # -- decisions ---------------------------------------------------------------------------------------------

    def admit(self, seq: Sequence, kept: int, sharing: int) -> Decision | None:
        """Decide about a request that would be admitted next. None: nothing to compress. While trying is free, a place
        without a price is tried even with what compression does not pay for, as the few tokens of a warm-up."""
        self._request = None
        if not kept:
            return None
        request = seq.request
        context = request.compress_at
        load = RequestLoad(
            context, kept, seq.num_tokens - context, request.sampling.max_tokens - seq.num_sampled, sharing
        )
        decision = decide(self.observed.costs, load, self.limits)
        if not decision.compress and self.freely and self._untried_place() is not None:
            decision = dataclasses.replace(decision, compress=True, reason=TRIED)
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
        self._placed = self._place()
        return self._placed[0]

    def _place(self) -> tuple[str, str]:
        untried, costs = self._untried_place(), self.observed.costs
        best = cheapest(costs, self.limits, self._ahead)
        if untried is not None and self._may_try():
            return untried, TRIED
        if best is None:
            return self.limits.places[0], NOT_MEASURED
        if best != self.limits.places[0]:
            return best, CHEAPEST
        unseen = any(not seen_nearly(costs, place, self._ahead) for place in costs.exposed)
        return best, NOT_SEEN if unseen and cheapest(costs, self.limits, 0) != best else FIXED_IS_BEST

    def _untried_place(self) -> str | None:
        """The fixed place first. Where that costs next to nothing, no other can be clearly better; and one that was
        seen to cost clearly more is not tried again. What runs beside a prefill is told from one seen alone."""
        costs, seen, places = self.observed.costs, self.observed.exposed, self.limits.places
        known = costs.exposed.get(places[0]) if places else None
        if known is not None:
            clear = PLACE_MARGIN * (costs.prefill_s_per_token or 0.0)
            others = places[1:] if known > clear else ()
            places = tuple(n for n in others if not seen[n].count or seen[n].value <= known + clear)
        elif costs.prefill_s_per_token is None:
            alone = (n for n in places if not n.startswith(BESIDE) and self._trials[n] < MOST_TRIALS)
            return next(alone, self._untried(places, seen))
        return self._untried(places, seen)

    def turns(self, load: Load) -> tuple[Turn, ...]:
        """A stage policy (stages.StagePolicy): prompts first, alone or with decoding sequences riding along."""
        self._chosen = chosen = self._balance(load)
        if chosen.split is not None:
            return Turn(PREFILL, max_tokens=side_by_side.MOST_TOKENS, split=chosen.split), *LATER
        prompts = None if chosen.chunk is None else max(chosen.chunk - load.decode.pending, 1)
        self._ahead = load.prefill_tokens if prompts is None else min(prompts, load.prefill_tokens)
        together = chosen.together
        return Turn(PREFILL, max_tokens=prompts, together=together, cut=together), *LATER

    def _balance(self, load: Load) -> Balance:
        pending, decoding = load.prefill.pending, load.decode.pending
        if not (pending and decoding and self.cuts_prompts):
            return Balance(False, None, NOTHING)
        observed, costs = self.observed, self.observed.costs
        kv_bytes = 0.0 if self.limits.tpot_s is None else observed.kv_bytes  # else no answer depends on them
        mix = Mix(pending, decoding, load.at_once, load.blocked, kv_bytes, load.prefill_tokens)
        if costs is self._balanced_with and mix == self._mix:
            return self._balanced
        self._mix, self._balanced_with = mix, None
        if self._untried(self.limits.chunks, observed.mixed) is not None and self._may_try():
            tokens, worth = mix.prompt_tokens + decoding, worth_trying(costs, self.limits, mix)
            untried = self._untried(tuple(chunk for chunk in worth if tells(chunk, tokens)), observed.mixed)
            if untried is not None:
                return Balance(True, untried, TRIED)
        if self.freely and (split := self._untried_split(mix)) is not None:
            return Balance(False, None, TRIED, split=split)
        self._balanced_with, self._balanced = costs, balance(costs, self.limits, mix)
        return self._balanced

    def _untried_split(self, mix: Mix) -> str | None:
        """A trial occupies two sides for a while: only a warm-up has the time."""
        worth = side_by_side.worth_trying(self.observed.costs, self.limits, mix.blocked, mix.prompt_tokens)
        return self._untried(worth, self.observed.sides)

    def _untried(self, names: tuple[Any, ...], observed: dict[Any, Any]) -> Any | None:
        """What still needs a trial; each gets a bounded number of them, whether or not they say anything."""
        untried = (n for n in names if observed[n].count < TRIALS and self._trials[n] < MOST_TRIALS)
        return next(untried, None)

    def _may_try(self) -> bool:
        return self.freely or self._lost_s <= TRYING_SHARE * self._ran_s

    def taken(self, step: Step) -> None:
        """A prefill step is being launched as decided: remember why."""
        tried = False
        prompts = step.chunks[: len(step.chunks) - step.decode_rows]
        if not step.aside and any(chunk.kept or chunk.defer for chunk in prompts):
            place, reason = self._placed
            self._trials[place] += reason == TRIED
            tried = reason == TRIED and place != self.limits.places[0]  # the fixed one would have run anyway
            self._note(("place", place, reason), None, None)
        chosen = self._chosen
        if chosen.reason != NOTHING:
            if chosen.reason == TRIED:
                tried = True
                told = chosen.split is not None or tells(chosen.chunk, step.num_tokens)
                self._trials[chosen.split or chosen.chunk] += told
            self._note(("balance", chosen.choice, chosen.reason), self._mix, chosen)
        self._tried.append(tried)

    def _note(self, key: tuple[str, ...], inputs: Any, outcome: Any) -> None:
        self._counts[key] += 1
        if key not in self._first:
            self._first[key] = {
                "inputs": _named(inputs) if inputs else None,
                "outcome": _named(outcome) if outcome else None,
                "costs": dataclasses.asdict(self.observed.costs),
            }

    # -- observations ------------------------------------------------------------------------------------------

    def observe(self, step: Step, elapsed_s: float, compression_s: float, under_way: bool) -> None:
        """A step's tokens have arrived (see `Observed.observe`), in the order of launches."""
        lost_s = self.observed.observe(step, elapsed_s, compression_s, under_way)
        self._ran_s += elapsed_s
        if not step.decode and self._tried and self._tried.popleft() and not self.freely:
            self._lost_s += max(lost_s, 0.0)

    # -- report ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was decided, not what was measured."""
        self._counts.clear()
        self._first.clear()
        self.observed.reset()

    def report(self) -> dict[str, Any]:
        """Decisions with their count and the first one's inputs; costs now; predicted and measured step times."""
        return {
            "decisions": [
                {"about": key[0], "choice": key[1], "reason": key[2], "count": count, **self._first[key]}
                for key, count in self._counts.most_common()
            ],
            "measured": self.measured,
            "costs": dataclasses.asdict(self.observed.costs),
            "places": list(self.limits.places),
            "splits": list(self.limits.splits),
            "steps": {
                kind: {"count": n, "predicted_s": expected, "measured_s": measured}
                for kind, (n, expected, measured) in self.observed.predicted.items()
            },
        }


def _named(values: Any) -> dict[str, Any]:
    return values._asdict() if isinstance(values, tuple) else dataclasses.asdict(values)
