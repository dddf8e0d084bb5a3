"""Which stage runs next, on how many sequences: prefill, compression or decode. Pure functions over counts.

Every policy sees the same queues and answers with turns in order of preference; the scheduler takes the first
that the free pages allow. So policies are compared on one engine, with one method at one ratio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from fastcache.config import STATIC_POLICY

PREFILL, COMPRESS, DECODE = "prefill", "compress", "decode"
# A prefill of fewer tokens than this leaves the matrix units waiting for weights, so two of them cost one step's worth
# together; the time is how long such a small one may be held back for company, while others decode.
ENOUGH_TOKENS, PATIENCE_S = 256, 0.01
# Prefill tokens of a step that decoding sequences ride on: what they wait for, at most, between two tokens.
MIXED_TOKENS = 2_048


class Queue(
    NamedTuple
):  # as the others below: made at every step, and a frozen dataclass takes four times as long
    """Sequences that could take part in a stage's next batch, and since when the first of them is ready."""

    pending: int = 0
    since_s: float = 0.0


class Load(NamedTuple):
    """The engine's queues at one moment. `prefill` counts waiting requests and unfinished prefills; their tokens
    are counted up to one full step. `blocked`: a waiting request needs a running one to end first. `at_once`: how many
    run together once all have come in who may. Since when sequences can decode is told to policies `by_age`."""

    now_s: float
    prefill: Queue
    compress: Queue
    decode: Queue
    prefill_tokens: int = 0
    blocked: bool = False
    at_once: int = 0

    def queues(self) -> dict[str, Queue]:
        """By stage, the most downstream first."""
        return {DECODE: self.decode, COMPRESS: self.compress, PREFILL: self.prefill}


class Turn(NamedTuple):
    """A stage, and the largest batch it may take: sequences, prefill tokens; None is the engine's own limit.

    `together`: decoding sequences ride on the prefill's forward pass. `cut`: any prompt may be cut to fill the step,
    not the first one alone; those that are cut are compressed out of pages. `split`: prefill runs on one side of this
    SM split, beside decode steps on the other.
    """

    stage: str
    max_seqs: int | None = None
    max_tokens: int | None = None
    together: bool = False
    cut: bool = False
    split: str | None = None


class StagePolicy(Protocol):
    """`deferred`: compression is a stage of its own, after prefill, rather than inside its forward pass.
    `cuts_prompts`: a turn may allow fewer prefill tokens than a step could hold. `by_age`: it asks since when sequences
    are ready to decode."""

    deferred: bool
    cuts_prompts: bool
    by_age: bool

    def turns(self, load: Load) -> tuple[Turn, ...]:
        """What to run now, most wanted first; stages that are not named run only if none of these can."""
        ...


@dataclass(frozen=True)
class PrefillFirst:
    """`default`: prompts before tokens, as fast as memory admits them. Best throughput of a closed batch."""

    deferred: bool = False
    cuts_prompts: ClassVar[bool] = False
    by_age: ClassVar[bool] = False

    def turns(self, load: Load) -> tuple[Turn, ...]:
        return Turn(PREFILL), Turn(COMPRESS), Turn(DECODE)


@dataclass(frozen=True)
class FirstComeFirstServed:
    """`fcfs`: the stage whose oldest work has waited longest runs; all that is pending in it joins."""

    deferred: bool = False
    cuts_prompts: ClassVar[bool] = False
    by_age: ClassVar[bool] = True

    def turns(self, load: Load) -> tuple[Turn, ...]:
        pending = [(queue.since_s, stage) for stage, queue in load.queues().items() if queue.pending]
        return tuple(Turn(stage) for _, stage in sorted(pending))


@dataclass(frozen=True)
class FixedBatches:
    """`pXcYdZ` (arXiv:2503.08461): a stage waits for its batch to fill and never takes more.

    Of several full stages the most downstream runs, which bounds what piles up between them. A batch that is
    not full runs only when no other is full either: then nothing else is there to wait for.
    """

    prefill: int
    compress: int
    decode: int
    deferred: bool = True
    cuts_prompts: ClassVar[bool] = False
    by_age: ClassVar[bool] = False

    def turns(self, load: Load) -> tuple[Turn, ...]:
        sizes = {DECODE: self.decode, COMPRESS: self.compress, PREFILL: self.prefill}
        full, part = [], []
        for stage, queue in load.queues().items():
            if queue.pending:
                (full if queue.pending >= sizes[stage] else part).append(Turn(stage, sizes[stage]))
        return tuple(full + part)


@dataclass(frozen=True)
class Dynamic:
    """`dynamic`: a stage runs when enough is pending or something has waited too long, as large as free memory
    allows; decoding sequences ride on every prefill, so neither waits for the other.

    It does the same work as any other policy with fewer passes over the weights, and never leaves the device idle: what
    holds a prompt back is another step, not a clock.
    """

    enough_tokens: int = ENOUGH_TOKENS
    patience_s: float = PATIENCE_S
    mixed_tokens: int = MIXED_TOKENS
    deferred: bool = False
    cuts_prompts: ClassVar[bool] = True
    by_age: ClassVar[bool] = False

    def turns(self, load: Load) -> tuple[Turn, ...]:
        turns = []
        if load.compress.pending:
            turns.append(Turn(COMPRESS))
        if not load.decode.pending:
            turns.append(Turn(PREFILL))
        elif load.prefill.pending and self._due(load):
            turns.append(Turn(PREFILL, max_tokens=self.mixed_tokens, together=True))
        return (*turns, Turn(DECODE))

    def _due(self, load: Load) -> bool:
        waited = load.now_s - load.prefill.since_s
        return load.prefill_tokens >= self.enough_tokens or waited >= self.patience_s


def stage_policy(name: str) -> StagePolicy:
    """The policy called `name`, which `EngineConfig` has checked."""
    static = re.fullmatch(STATIC_POLICY, name)
    if static:
        return FixedBatches(*map(int, static.groups()))
    return {"default": PrefillFirst, "fcfs": FirstComeFirstServed, "dynamic": Dynamic}[name]()
