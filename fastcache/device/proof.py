"""Prove on the GPU at hand that a split of its SMs is real, or record in one line why there is none.

Real means: disjoint, as large as granted, independent, kept by CUDA graphs, and made once however often the
split changes. `prove` returns one JSON-ready record of raw numbers and verdicts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcache.config import PartitionConfig
from fastcache.device import green_context, info, probe_logic
from fastcache.device.partition import Partition
from fastcache.device.probe import BLOCK_US, LONG_BLOCK_US, Probe, compute_errors, whole_device
from fastcache.device.sms import DeviceSms
from fastcache.errors import ConfigError, OutputPathError, UserError

logger = logging.getLogger(__name__)

SCHEMA = 1
RATIOS = (0.06, 0.12, 0.2, 0.25, 0.3, 0.4, 0.5)
CHANGES = 1000
SAMPLES = 20
FLAT_BYTES = 2 << 20
COMPUTE_TOLERANCE = 1e-2


def prove(
    device: int = 0, ratios: Sequence[float] = RATIOS, changes: int = CHANGES, require: bool = False
) -> dict[str, Any]:
    """Run the whole proof. `ratios` are compression shares; main takes the rest.

    Errors: ConfigError for fewer changes than a verdict on flat memory needs, UnsupportedCombination when
    `require` and there are no green contexts here.
    """
    import torch

    if changes < probe_logic.MIN_SAMPLES:
        raise ConfigError(
            f"changes is {changes}; whether memory stays flat shows from {probe_logic.MIN_SAMPLES} changes of "
            f"split on, and well from some hundred ({CHANGES} is the default)."
        )

    record = {"schema": SCHEMA, "versions": info.versions(), **environment()}
    if not torch.cuda.is_available():
        made = green_context.partition(_config(ratios[0], require), "cpu")
        return record | {"status": "unavailable", "passed": None, "reason": made.reason, "splits": []}
    made = green_context.partition(_config(ratios[0], require), torch.device("cuda", device))
    record |= {
        "device": info.device_info(f"cuda:{device}"),
        "granularity": vars(green_context.device_sms(device)),
        "provider": made.provider,
        "attempts": list(made.attempts),
    }
    if not made.exclusive:
        return record | {"status": "unavailable", "passed": None, "reason": made.reason, "splits": []}
    return record | prove_splits(device, ratios, changes)


def prove_splits(device: int, ratios: Sequence[float], changes: int) -> dict[str, Any]:
    """Every split of `ratios`, then flat memory over `changes` changes among them."""
    probe, sms = Probe(device), green_context.device_sms(device)
    at, over = whole_device(probe, sms.total)
    whole = probe_logic.judge_capacity(BLOCK_US, at.wall_us, over.wall_us, sms.total) | {
        "ids": sorted(at.ids)
    }
    control = probe.plain_delay(sms.total)
    splits = [prove_split(probe, sms, ratio, at.ids, control) for ratio in ratios]
    memory = change_splits(probe, ratios, changes)
    passed = probe_logic.conclude([whole, memory, *splits])
    return {
        "status": "proven" if passed else "failed",
        "passed": passed,
        "reason": None if passed else "; ".join(_failures(whole, memory, splits)),
        "whole_device": whole,
        "splits": splits,
        "memory": memory,
    }


def prove_split(
    probe: Probe, sms: DeviceSms, ratio: float, whole: frozenset[int], control_us: float
) -> dict[str, Any]:
    """All measurements of one split. The record's `passed` needs every part."""
    partition = green_context.partition(_config(ratio), probe.device)
    granted = (partition.granted_sms["main"], partition.granted_sms["compress"])
    main = probe.measure(partition.main, granted[0] or sms.total)
    compress = probe.measure(partition.compress, granted[1] or sms.total)
    graph, refused = probe.graph_ids(partition, partition.main, len(main.ids))
    unnamed = probe.unnamed_graph_ids(partition.main, sms.total)
    delay = probe.delay(partition.main, len(main.ids), partition.compress)
    parts = {
        "identity": probe_logic.judge_identity(main.ids, compress.ids, granted, whole),
        "capacity_main": capacity(probe, partition.main, len(main.ids)),
        "capacity_compress": capacity(probe, partition.compress, len(compress.ids)),
        "independence": probe_logic.judge_independence(LONG_BLOCK_US, delay, control_us),
        "graph": probe_logic.judge_graph(graph, main.ids, unnamed, refused),
        "compute_main": compute(partition, "main", probe),
        "compute_compress": compute(partition, "compress", probe),
    }
    return {
        "compress_ratio": ratio,
        "provider": partition.provider,
        "requested_sms": partition.requested_sms,
        "granted_sms": partition.granted_sms,
        "granted_from": partition.granted_from,
        "passed": probe_logic.conclude(list(parts.values())),
        **parts,
    }


def capacity(probe: Probe, stream: Any, blocks: int) -> dict[str, Any]:
    at, over = probe.measure(stream, blocks), probe.measure(stream, blocks + 1)
    return probe_logic.judge_capacity(BLOCK_US, at.wall_us, over.wall_us, blocks)


def compute(partition: Partition, side: str, probe: Probe) -> dict[str, Any]:
    errors = compute_errors(getattr(partition, side), probe.device)
    return probe_logic.judge_compute(errors, COMPUTE_TOLERANCE)


def change_splits(probe: Probe, ratios: Sequence[float], changes: int) -> dict[str, Any]:
    """Change the split `changes` times with work on both sides of each, sampling free device memory SAMPLES times
    or, in a run shorter than that, at every change."""
    import torch

    sample_every = max(1, changes // SAMPLES)
    buffers = (probe.buffers(1), probe.buffers(1))

    def change(ratio: float) -> None:
        partition = green_context.partition(_config(ratio), probe.device)
        for stream, each in zip(partition.streams, buffers, strict=True):
            probe.launch(stream, 1, 5, each)

    for ratio in ratios:
        change(ratio)
    torch.cuda.synchronize(probe.device)
    free = []
    for i in range(changes):
        change(ratios[i % len(ratios)])
        if i % sample_every == 0:
            torch.cuda.synchronize(probe.device)
            free.append(torch.cuda.mem_get_info(probe.device)[0])
    return probe_logic.judge_memory(free, changes, FLAT_BYTES) | {"free_bytes": free, "splits": len(ratios)}


def _prove_or_say_why(changes: int, require: bool) -> dict[str, Any]:
    try:
        return prove(changes=changes, require=require)
    except UserError:
        raise
    except Exception as error:  # a driver or compiler may fail in any way; the record is what tells of it
        logger.exception("the proof could not be carried out")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        failed = {"status": "failed", "passed": False, "reason": reason, "splits": []}
        return {"schema": SCHEMA, "versions": info.versions()} | environment() | failed


def environment() -> dict[str, Any]:
    """What decides whether two streams can really run together, apart from the split."""
    names = (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
        "LD_PRELOAD",
        "CUDA_MODULE_LOADING",
    )
    return {"environment": {name: os.environ.get(name) for name in names}}


def _config(ratio: float, require: bool = False) -> PartitionConfig:
    return PartitionConfig(True, ratio, 1 - ratio, main_stream=True, require=require)


def _failures(whole: dict[str, Any], memory: dict[str, Any], splits: Sequence[dict[str, Any]]) -> list[str]:
    failed = [name for name, part in (("whole device", whole), ("memory", memory)) if not part["passed"]]
    for split in splits:
        parts = [
            name for name, part in split.items() if isinstance(part, dict) and part.get("passed") is False
        ]
        if parts:
            failed.append(f"split {split['compress_ratio']}: {', '.join(parts)}")
    return failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PROOF.json", help="the record to write"
    )
    parser.add_argument("--require", action="store_true", help="no green contexts here is an error")
    parser.add_argument("--changes", type=int, default=CHANGES, help="changes of split in the memory part")


def run(args: argparse.Namespace) -> int:
    """`fastcache prove-greenctx`: 0 when proven or recorded as unavailable, 1 when a measurement contradicts it."""
    record = _prove_or_say_why(args.changes, args.require)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = args.output.with_name(args.output.name + ".part")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, args.output)
    except OSError as error:
        raise OutputPathError(f"{args.output} cannot be written: {error.strerror or error}.") from error
    sys.stdout.write(f"green contexts: {record['status']}: {record['reason'] or record['provider']}\n")
    return 1 if record["passed"] is False else 0
