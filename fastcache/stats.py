"""What the engine counts while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastcache.core import Step

MOST_SEGMENTS = 400
GAP_S = 0.005  # steps that begin no later behind the one before are one segment


@dataclass(frozen=True)
class KVSample:
    """Pages in use at one moment (`time.perf_counter()` seconds), by the stage of their sequences, and counts of
    requests. `before`: in prefill, or stored and not yet compressed, fresh pages included. `compressed`, `whole`:
    decoding from a compressed or a full cache. `held`: compressed away, kept until their request ends."""

    time_s: float
    before: int
    compressed: int
    whole: int
    held: int
    running: int
    waiting: int


@dataclass
class Segment:
    """Steps of one kind, one right behind the other, from `start_s` to `end_s` (`time.perf_counter()` seconds).

    `stage`: prefill, mixed, decode or compress. `stream`: main; compress, beside the main one; aside, of prefills on a
    side of their own, beside decode steps; or inside, of compression in the main stream within a step, which is known
    where an engine times it to decide.
    """

    stage: str
    stream: str
    start_s: float
    end_s: float
    steps: int = 1


@dataclass(frozen=True)
class EngineLoad:
    """Requests running and waiting, and pages owned by them, of `num_pages` that can be owned."""

    running: int
    waiting: int
    pages_used: int
    num_pages: int


@dataclass
class EngineStats:
    """Counters since the last `reset_stats`. Tokens are counted where they are scheduled.

    `prefill_tokens` and `decode_tokens` include those of mixed steps, which the `mixed_` fields repeat; the times
    are of pure steps, mixed steps and compression steps apart. `kv` and `segments` hold a bounded number of entries.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_time_s: float = 0.0
    decode_time_s: float = 0.0
    peak_pages: int = 0
    peak_kv_bytes: int = 0
    peak_running: int = 0
    preemptions: int = 0
    compressed_sequences: int = 0
    too_short_to_compress: int = 0
    left_whole: int = 0
    pages_freed: int = 0
    mixed_steps: int = 0
    mixed_prefill_tokens: int = 0
    mixed_decode_tokens: int = 0
    mixed_time_s: float = 0.0
    compress_steps: int = 0
    compress_time_s: float = 0.0
    timeouts: int = 0
    kv: list[KVSample] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def count(self, step: Step) -> None:
        """Add a launched step."""
        self.prefill_tokens += step.prefill_tokens
        self.decode_tokens += step.decode_tokens
        if step.decode_rows:
            self.mixed_steps += 1
            self.mixed_prefill_tokens += step.prefill_tokens
            self.mixed_decode_tokens += step.decode_tokens
        elif step.decode:
            self.decode_steps += 1
        else:
            self.prefill_steps += 1

    def add_time(self, step: Step, seconds: float, end_s: float) -> None:
        """Add how long a step took, and when it was over."""
        if step.decode_rows:
            self.mixed_time_s += seconds
            stage = "mixed"
        elif step.decode:
            self.decode_time_s += seconds
            stage = "decode"
        else:
            self.prefill_time_s += seconds
            stage = "prefill"
        self.ran(stage, "aside" if step.aside else "main", seconds, end_s)

    def ran(self, stage: str, stream: str, seconds: float, end_s: float) -> None:
        """Note what a stream was busy with; the first `MOST_SEGMENTS` are kept."""
        last = next((segment for segment in reversed(self.segments) if segment.stream == stream), None)
        start_s = end_s - seconds
        if last is not None:  # the host's clock tells an end a little late
            start_s, end_s = max(start_s, last.end_s), max(end_s, last.end_s)
            if last.stage == stage and start_s - last.end_s <= GAP_S:
                last.end_s, last.steps = end_s, last.steps + 1
                return
        if len(self.segments) < MOST_SEGMENTS:
            self.segments.append(Segment(stage, stream, start_s, end_s))
