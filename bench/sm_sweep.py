"""What a share of the SMs is worth: prefill, decode and compression work, alone and together, split by split.

    python bench/sm_sweep.py --output results/sm-sweep            # writes sm_sweep.csv and sm_sweep.json

One layer's work in Qwen3-8B shapes, bf16. Every split runs each work alone on each side, then pairs of works at
the same time; controls run the same pairs one after the other on the whole GPU and on two plain streams. A row is
one (split, mode, work) with all repeats. Times are milliseconds from a common start event to each side's own end.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.compression.base import LayerKV, budget, select
from fastcache.compression.registry import create
from fastcache.config import CompressionConfig, PartitionConfig
from fastcache.device import green_context, info
from fastcache.device.streams import plain_pair

RATIOS = (0.06, 0.12, 0.18, 0.24, 0.3, 0.36, 0.42, 0.48, 0.5)
TOGETHER = (("prefill", "compress"), ("decode", "compress"), ("prefill", "decode"))
# About 10 ms of spinning, so that all launches are queued before the first one starts.
GATE_CYCLES = 20_000_000
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 32, 8, 128, 3968
DECODE_BATCH, COMPRESS_BATCH, PREFILL_TOKENS = 64, 8, 8192


@dataclass(frozen=True)
class Work:
    """Something to run. `amount` is what one run does, in `unit` (TFLOP, TB, million tokens)."""

    name: str
    run: Callable[[], Any]
    amount: float
    unit: str


@dataclass(frozen=True)
class Row:
    """One measured side. `rate` is `amount` per second of the median; `makespan_ms` the pair's, median."""

    compress_ratio: float | None
    mode: str
    work: str
    partner: str | None
    side: str
    sms: int | None
    provider: str | None
    repeats_ms: tuple[float, ...]
    median_ms: float
    makespan_ms: float
    rate: float
    unit: str


def works(device: torch.device) -> dict[str, Work]:
    """The three works, sized to some ten milliseconds on a whole H100."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    return {"prefill": _prefill(random), "decode": _decode(random), "compress": _compress(random, device)}


def _prefill(random: Callable[..., torch.Tensor]) -> Work:
    """The gate-and-up projection of 8,192 tokens, eight times over."""
    x, w = random(PREFILL_TOKENS, 4096), random(4096, 24576)
    out, times = torch.empty(PREFILL_TOKENS, 24576, dtype=x.dtype, device=x.device), 8

    def run() -> None:
        for _ in range(times):
            torch.mm(x, w, out=out)

    return Work("prefill", run, times * 2 * PREFILL_TOKENS * 4096 * 24576 / 1e12, "TFLOP")


def _decode(random: Callable[..., torch.Tensor]) -> Work:
    """Attention of 64 sequences over 3,968 entries, as two batched products and a softmax, twelve times over."""
    groups = DECODE_BATCH * KV_HEADS
    q = random(groups, HEADS // KV_HEADS, HEAD_DIM)
    k, v, times = random(groups, CONTEXT, HEAD_DIM), random(groups, CONTEXT, HEAD_DIM), 12

    def run() -> None:
        for _ in range(times):
            scores = torch.bmm(q, k.transpose(1, 2)) * HEAD_DIM**-0.5
            torch.bmm(torch.softmax(scores, -1), v)

    return Work("decode", run, times * (k.nbytes + v.nbytes) / 1e12, "TB")


def _compress(random: Callable[..., torch.Tensor], device: torch.device) -> Work:
    """SnapKV at a factor of 5: score, select and gather one layer of eight sequences, twelve times over."""
    ratio, times = 0.8, 12
    method = create(CompressionConfig("snapkv", ratio))
    keys, values = (random(COMPRESS_BATCH, KV_HEADS, CONTEXT, HEAD_DIM) for _ in range(2))
    queries = random(COMPRESS_BATCH, HEADS, method.window, HEAD_DIM)
    lengths = torch.full((COMPRESS_BATCH,), CONTEXT, device=device)
    kept = budget(CONTEXT, ratio)
    budgets = torch.full((COMPRESS_BATCH,), kept, device=device)
    kv = LayerKV(0, 36, keys, values, lengths, budgets, window_queries=queries)

    def run() -> None:
        for _ in range(times):
            index = select(method.score(kv), lengths, budgets, kept)[..., None].expand(-1, -1, -1, HEAD_DIM)
            keys.gather(2, index), values.gather(2, index)

    return Work("compress", run, times * COMPRESS_BATCH * CONTEXT / 1e6, "Mtoken")


def timed(sides: Sequence[tuple[Work, Any]]) -> list[float]:
    """Run each work on its stream, all released by one gate; milliseconds from the gate to each side's end."""
    gate = torch.cuda.current_stream()
    start = torch.cuda.Event(enable_timing=True)
    ends = [torch.cuda.Event(enable_timing=True) for _ in sides]
    torch.cuda.synchronize()
    torch.cuda._sleep(GATE_CYCLES)
    start.record(gate)
    for (work, stream), end in zip(sides, ends, strict=True):
        stream.wait_event(start)
        with torch.cuda.stream(stream):
            work.run()
            end.record(stream)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for end in ends]


def measure(sides: Sequence[tuple[Work, Any]], repeats: int) -> list[tuple[float, ...]]:
    """Per side, the times of all repeats after one warm-up."""
    timed(sides)
    return list(zip(*(timed(sides) for _ in range(repeats)), strict=True))


def rows_of(sides: Sequence[tuple[Work, Any]], repeats: int, labels: Sequence[dict[str, Any]]) -> list[Row]:
    """Measure the sides together and describe each with its labels."""
    times = measure(sides, repeats)
    makespan = statistics.median(max(each) for each in zip(*times, strict=True))
    rows = []
    for (work, _), values, label in zip(sides, times, labels, strict=True):
        median = statistics.median(values)
        rate = work.amount / (median / 1e3)
        measured = {"repeats_ms": values, "median_ms": median, "makespan_ms": makespan, "rate": rate}
        rows.append(Row(**label, **measured, work=work.name, unit=f"{work.unit}/s"))
    return rows


def controls(everything: dict[str, Work], total: int, device: int, repeats: int) -> list[Row]:
    """The whole GPU: each work alone, each pair in sequence on one stream, each pair on two plain streams."""
    stream, low = plain_pair(device)
    base = {"compress_ratio": None, "sms": total, "provider": None}
    rows = []
    for work in everything.values():
        label = base | {"mode": "alone", "partner": None, "side": "whole"}
        rows += rows_of([(work, stream)], repeats, [label])
    for first, second in TOGETHER:
        for mode, streams in (("sequential", (stream, stream)), ("plain_streams", (stream, low))):
            labels = [base | {"mode": mode, "partner": other, "side": "whole"} for other in (second, first)]
            sides = list(zip((everything[first], everything[second]), streams, strict=True))
            rows += rows_of(sides, repeats, labels)
    return rows


def split_rows(everything: dict[str, Work], ratio: float, device: int, repeats: int) -> list[Row]:
    """One split: each work alone on each side, then the pairs, first on main and second on compress."""
    where = torch.device("cuda", device)
    config = PartitionConfig(True, ratio, 1 - ratio, main_stream=True, require=True)
    partition = green_context.partition(config, where)
    granted, base = partition.granted_sms, {"compress_ratio": ratio, "provider": partition.provider}
    rows = []
    for side in ("main", "compress"):
        label = base | {"mode": "alone", "partner": None, "side": side, "sms": granted[side]}
        for work in everything.values():
            rows += rows_of([(work, getattr(partition, side))], repeats, [label])
    for first, second in TOGETHER:
        labels = [
            base | {"mode": "together", "partner": second, "side": "main", "sms": granted["main"]},
            base | {"mode": "together", "partner": first, "side": "compress", "sms": granted["compress"]},
        ]
        sides = [(everything[first], partition.main), (everything[second], partition.compress)]
        rows += rows_of(sides, repeats, labels)
    return rows


def write(folder: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sm_sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    record = facts | {"rows": [asdict(row) for row in rows]}
    (folder / "sm_sweep.json").write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for sm_sweep.csv and sm_sweep.json"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=RATIOS, help="compression shares of the SMs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=int, default=0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("error: the sweep needs a CUDA GPU; `fastcache doctor` says what is here.\n")
        return 2
    torch.cuda.set_device(options.device)
    everything = works(torch.device("cuda", options.device))
    total = green_context.device_sms(options.device).total
    rows = controls(everything, total, options.device, options.repeats)
    for ratio in options.ratios:
        rows += split_rows(everything, ratio, options.device, options.repeats)
    facts = {"device": info.device_info(f"cuda:{options.device}"), "versions": info.versions()}
    write(options.output, rows, facts)
    sys.stdout.writelines(line(row) for row in rows)
    return 0


def line(row: Row) -> str:
    where = f"{row.compress_ratio!s:>5} {row.mode:<13} {row.side:<8} {row.work:<8} on {row.sms!s:>4} SMs"
    return f"{where} {row.median_ms:8.2f} ms {row.rate:9.2f} {row.unit} makespan {row.makespan_ms:8.2f}\n"


if __name__ == "__main__":
    sys.exit(main())
