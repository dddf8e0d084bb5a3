"""Host time that deciding takes per step: queues counted, turns chosen, costs updated, a request decided.

    python bench/policy_overhead.py --running 256 --waiting 64 --output results/policy-overhead.json

Runs on any machine: nothing of it touches a device. Means over many steps, in microseconds, without the
slowest hundredth, which the machine's other work explains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from fastcache.bench.provenance import git_commit, source_digest
from fastcache.config import SamplingParams
from fastcache.core import Chunk, Request, Sequence, Step
from fastcache.device.info import device_info
from fastcache.engine.policy import Limits
from fastcache.engine.queues import Queues
from fastcache.engine.tuner import Tuner

log = logging.getLogger("policy_overhead")
BYTES_PER_TOKEN = 147_456  # Qwen3-8B, bfloat16
PLACES, CHUNKS = ("inline", "beside:16", "beside:8", "after:16"), (256, 512, 1024, 2048, 4096)
SPLITS = ("100+32", "84+48")


def sequences(count: int, decoding: bool) -> list[Sequence]:
    made = []
    for number in range(count):
        request = Request(str(number), (1,) * 2048, SamplingParams(max_tokens=512, ignore_eos=True), 0.0)
        seq = Sequence(request, kv_len=410, num_computed=2048, num_sampled=1, decoding=decoding, seat=number)
        made.append(seq)
    return made


def microseconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.mean(sorted(times)[: repeats - repeats // 100])


@dataclasses.dataclass(frozen=True)
class Bench:
    """A tuner that has seen every kind of step, the steps, and the sequences they are of."""

    tuner: Tuner
    active: list[Sequence]
    queued: list[Sequence]
    decode: Step
    prefill: Step
    mixed: Step

    def on_a_side(self, step: Step) -> Step:
        return dataclasses.replace(step, split=SPLITS[0], place="inline" if step.place else None)


def prepare(running: int, waiting: int) -> Bench:
    limits = Limits(running, 400_000 * BYTES_PER_TOKEN, BYTES_PER_TOKEN, PLACES, CHUNKS, SPLITS)
    tuner = Tuner(limits, 3e12)
    active, queued = sequences(running, True), sequences(waiting, False)
    decode = Step(tuple(Chunk(s, s.num_computed, s.kv_len, 1, sample=True) for s in active), decode=True)
    prompts = tuple(Chunk(s, 0, 0, 2048, sample=True, kept=410) for s in queued[:8])
    prefill = Step(prompts, decode=False, place="inline")
    mixed = [
        Step((Chunk(queued[0], 0, 0, chunk, sample=False), *decode.chunks), decode=False, decode_rows=running)
        for chunk in CHUNKS
    ]
    for _ in range(10):
        tuner.observe(decode, 0.008, 0.0, False)
        for place in PLACES:
            tuner.observe(dataclasses.replace(prefill, place=place), 0.5, 0.004, False)
        for step in mixed:
            tuner.observe(step, 0.03, 0.0, False)
        for split in SPLITS:
            tuner.observe(dataclasses.replace(decode, split=split), 0.014, 0.0, False)
            tuner.observe(dataclasses.replace(prefill, split=split), 0.9, 0.0, False)
    return Bench(tuner, active, queued, decode, prefill, mixed[1])


def measure(running: int, waiting: int, repeats: int) -> dict[str, float]:
    bench = prepare(running, waiting)
    tuner = bench.tuner
    queues = Queues(tuner.by_age)

    def load():
        return queues.load(0.0, bench.active, bench.queued, 32_768, True, running)

    def decode_step():
        tuner.turns(load())
        tuner.observe(bench.decode, 0.008, 0.0, False)

    def prefill_step():
        tuner.turns(load())
        tuner.place()
        tuner.taken(bench.prefill)
        tuner.observe(bench.prefill, 0.5, 0.004, False)

    def mixed_step():
        tuner.turns(load())
        tuner.place()
        tuner.taken(bench.mixed)
        tuner.observe(bench.mixed, 0.03, 0.0, False)

    aside, beside = bench.on_a_side(bench.prefill), bench.on_a_side(bench.decode)

    def aside_step():
        tuner.turns(load())
        tuner.taken(aside)
        tuner.observe(aside, 0.9, 0.0, False)

    def beside_step():
        tuner.turns(load())
        tuner.observe(beside, 0.014, 0.0, False)

    return {
        "aside_step_us": microseconds(aside_step, repeats),
        "beside_step_us": microseconds(beside_step, repeats),
        "mixed_step_us": microseconds(mixed_step, repeats),
        "queues_us": microseconds(load, repeats),
        "decode_step_us": microseconds(decode_step, repeats),
        "prefill_step_us": microseconds(prefill_step, repeats),
        "request_us": microseconds(lambda: tuner.admit(bench.queued[0], 410, running + waiting), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = measure(args.running, args.waiting, args.repeats)
    log.info("%d running, %d waiting: %s", args.running, args.waiting, found)
    facts = {"running": args.running, "waiting": args.waiting, "repeats": args.repeats, **found}
    facts |= {"host": device_info("cpu"), "git_commit": git_commit(), "source_digest": source_digest()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
