"""The scheduler on a device that is a formula: steps take the time that an H100 was recorded to take, on a clock of
its own. What was recorded is read from results/published; what never was (the overhead of a mixed step) is a
parameter. Nothing sleeps and nothing touches a device."""

from __future__ import annotations

import csv
import json
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from fastcache.compression.cost import MethodCost, load_costs
from fastcache.config import SamplingParams
from fastcache.core import Request, Sequence, Step
from fastcache.engine.amounts import amounts
from fastcache.engine.chunks import Limits as StepLimits
from fastcache.engine.policy import INLINE, Limits
from fastcache.engine.scheduler import Scheduler
from fastcache.engine.tuner import Tuner
from fastcache.engine.tuning import CHUNK_PARTS
from fastcache.kvcache.pages import PageAllocator
from fastcache.stats import EngineStats

PUBLISHED = Path(__file__).parents[1] / "results/published"
BYTES = 147_456  # of KV per token: Qwen3-8B, bfloat16
WEIGHT_BYTES, COPY_BYTES_S = 15.1e9, 3.0e12
CHUNKS = tuple(32_768 // part for part in CHUNK_PARTS)


class Keeps:
    """The numbers of snapkv at factor 5 (see `demand.CompressionPlan`)."""

    replays = False

    def tail(self, num_tokens: int) -> int:
        return 64

    def kept(self, num_tokens: int, image_spans: tuple = ()) -> int:
        return num_tokens // 5 if num_tokens // 5 > 64 else 0

    def layout(self, num_tokens: int) -> None:
        return None


@dataclass
class Device:
    """Seconds of a step. prefill_s: per token; decode_s: of a step without any KV; beside: what compression beside the
    prefill adds, per context token, by place; sides: by split, how many times as long as on the whole GPU a prefill and
    a decode step last beside each other. Guesses: eager_s, what a step that is no graph costs beyond its
    products; mixed_s, what one with decoding rows costs beyond that; host_s, within which none is launched, and for
    which the launch of a prefill keeps the host from the decode steps beside it."""

    prefill_s: float
    decode_s: float
    compression: MethodCost
    eager_s: float = 0.002
    mixed_s: float = 0.001
    host_s: float = 0.009
    beside: dict[str, float] = field(default_factory=dict)
    sides: dict[str, tuple[float, float]] = field(default_factory=dict)
    noise: float = 0.003
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def seconds(self, step: Step) -> tuple[float, float]:
        """(the whole step, of it compression)."""
        work = amounts(step, BYTES)
        read = work.kv_bytes / COPY_BYTES_S
        if step.decode:
            whole, compressing = self.decode_s + read, 0.0
        else:
            products = ((self.prefill_s * work.tokens) ** 3 + (WEIGHT_BYTES / COPY_BYTES_S) ** 3) ** (1 / 3)
            extra = self.eager_s + (self.mixed_s if step.decode_rows else 0.0)
            compressing = added = 0.0
            if work.compressed and step.place in (None, INLINE):
                compressing = added = self.compression.seconds(work.compressed)
            elif work.compressed:
                added = self.beside[step.place] * work.compressed
            whole = max(products + extra, self.host_s) + read + added
        if step.split is not None:
            whole *= self.sides[step.split][step.decode]
        return whole * (1 + self.noise * self.rng.gauss(0, 1)), compressing


def rows_of(name: str) -> list[dict]:
    rows = map(json.loads, (PUBLISHED / name / "rows.jsonl").read_text().splitlines())
    return [row for row in rows if row["status"] == "ok"]


def recorded(variant: str, context: int, batch: int = 64) -> dict:
    """The row of qwen3-8b with this many requests of this length, in all of the memory and bfloat16."""
    wanted = {"model": "qwen3-8b", "variant": variant, "context_used": context, "batch_size": batch}
    usual = {"kv_dtype": "auto", "num_pages": None, "enable_prefix_caching": False}
    (row,) = (
        r
        for r in rows_of("h100-compression")
        if r.items() >= wanted.items() and r["cell"].items() >= usual.items()
    )
    return row


def h100(**changes) -> Device:
    """From the rows of 64 x 3968 + 128 with compression, and the recorded cost of snapkv."""
    row = recorded("compression-only", 3968)
    cost = load_costs(PUBLISHED / "h100-compression/costs.json")[0]["snapkv"]
    per_token = 1 / row["prefill_tok_s"] - cost.seconds(32_768) / 32_768
    step_s = 64 / row["decode_tok_s"]
    return Device(per_token, step_s - 64 * (3968 // 5 + 64) * BYTES / COPY_BYTES_S, cost, **changes)


def recorded_sides(*decode_sms: int) -> dict[str, tuple[float, float]]:
    """By split, how many times as long as on the whole GPU one layer's prefill products and decode attention took, each
    while the other ran. The attention ended first: the rest of the products went as fast as alone on their side."""
    with (PUBLISHED / "h100-greenctx/sm_sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))

    def ms(work: str, partner: str, **of) -> float:
        wanted = {"work": work, "partner": partner, **of}.items()
        return next(float(row["median_ms"]) for row in rows if wanted <= row.items())

    whole = {work: ms(work, "", mode="alone", side="whole") for work in ("prefill", "decode")}
    found = {}
    for row in rows:
        if row["mode"] == "together" and row["work"] == "decode" and int(row["sms"]) in decode_sms:
            at = {"compress_ratio": row["compress_ratio"]}
            decode, prefill = float(row["median_ms"]), ms("prefill", "decode", mode="together", **at)
            done_alone = (prefill - decode) / ms("prefill", "", mode="alone", side="main", **at)
            lasts = decode / (1 - done_alone)
            found[f"{132 - int(row['sms'])}+{row['sms']}"] = (
                lasts / whole["prefill"],
                decode / whole["decode"],
            )
    return found


@dataclass
class Ask:
    context: int
    output: int
    time_s: float = 0.0


def tuner(max_seqs: int, pool_tokens=340_000, places=(INLINE,), chunks=CHUNKS, **more) -> Tuner:
    return Tuner(Limits(max_seqs, pool_tokens * BYTES, BYTES, places, tuple(chunks), **more), COPY_BYTES_S)


class Engine:
    """One step ahead of the device, as `LLM.step` is: a step is planned while the one before it runs. Prefills beside
    decode steps are taken between two steps."""

    def __init__(self, device: Device, max_seqs=64, pool_tokens=340_000, tuned=None, compress=True):
        limits = StepLimits(32_768, max_seqs, 16)
        self.device, self.tuner = device, tuned
        self.scheduler = Scheduler(
            limits,
            PageAllocator(pool_tokens // 16),
            EngineStats(),
            None,
            Keeps() if compress else None,
            tuned,
            tuner=tuned,
        )
        self.now_s = self.free_s = self.side_free_s = self.last_s = 0.0
        self.asides: deque[tuple[Step, float, float]] = deque()  # launched, and ends
        self.steps: list[tuple[str, float]] = []

    def run(self, asked: list[Ask]) -> list[Sequence]:
        """Every request to its end; returns the sequences, in the order asked."""
        start = self.now_s
        coming = deque(sorted(asked, key=lambda ask: ask.time_s))
        all_of, pending = [], None
        while coming or pending or self.scheduler.has_unfinished:
            while coming and start + coming[0].time_s <= self.now_s:
                all_of.append(self._add(coming.popleft(), start, len(all_of)))
            self._receive()
            while (step := self.scheduler.schedule()) is not None and step.aside:
                self._launch_aside(step)
            if step is None and pending is None:
                self._wait(start + coming[0].time_s if coming else None)
                continue
            launched = None
            if step is not None:
                seconds, compressing = self.device.seconds(step)
                kind = "decode" if step.decode else "mixed" if step.decode_rows else "prefill"
                self.steps.append((kind, seconds))
                self.free_s = max(self.free_s, self.now_s) + seconds
                launched = (step, self.now_s, self.free_s, compressing)
                self.scheduler.commit(step, self.now_s)
            if pending is not None:
                self._deliver(*pending)
            pending = launched
        return all_of

    def _launch_aside(self, step: Step) -> None:
        """Behind what the main stream has to do already, and behind the one before it."""
        seconds, _ = self.device.seconds(step)
        self.steps.append(("aside", seconds))
        begin = max(self.now_s, self.free_s, self.side_free_s)
        self.side_free_s = begin + seconds
        self.scheduler.commit(step, self.now_s)
        self.asides.append((step, begin, self.side_free_s))
        self.now_s += self.device.host_s

    def _receive(self) -> None:
        while self.asides and self.asides[0][2] <= self.now_s:
            step, begin, end = self.asides.popleft()
            if self.tuner is not None:
                self.tuner.observe(step, end - begin, 0.0, False)
            self.scheduler.receive(step, [7] * sum(c.sample for c in step.chunks), frozenset(), self.now_s)

    def _wait(self, arrival_s: float | None) -> None:
        """For the next request, or the prefill that is under way."""
        ends = [end for _, _, end in self.asides][:1]
        self.now_s = max(self.now_s, min([*ends, *([] if arrival_s is None else [arrival_s])]))

    def _add(self, ask: Ask, start: float, number: int) -> Sequence:
        params = SamplingParams(max_tokens=ask.output, ignore_eos=True)
        seq = Sequence(Request(str(number), (1,) * ask.context, params, start + ask.time_s))
        self.scheduler.add(seq)
        return seq

    def _deliver(self, step: Step, launched_s: float, end_s: float, compressing: float) -> None:
        self.now_s = max(self.now_s, end_s)
        if self.tuner is not None:
            elapsed = self.now_s - max(self.last_s, launched_s)
            self.tuner.observe(step, elapsed, compressing, False)
        self.last_s = self.now_s
        tokens = [7] * sum(chunk.sample for chunk in step.chunks)
        self.scheduler.complete(step, tokens, frozenset(), self.now_s)
