"""What an engine may choose from while it runs: the places where compression can go, the SM splits that prefill and
decode can share, each with its streams, and the tuner that chooses."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch

from fastcache.compression.base import EvictionMethod
from fastcache.compression.layer import NEEDS_ALL_QUERIES
from fastcache.config import EngineConfig, PartitionConfig
from fastcache.device.ceilings import measure
from fastcache.device.green_context import partition
from fastcache.device.partition import Partition
from fastcache.engine.chunks import Limits as StepLimits
from fastcache.engine.deferred import DEFERRABLE_NEEDS
from fastcache.engine.known_costs import known_costs
from fastcache.engine.policy import AFTER, BESIDE, INLINE, Limits
from fastcache.engine.tuner import Tuner
from fastcache.errors import UnsupportedCombination
from fastcache.kvcache.pool import KVPool

# Prefill budgets of mixed steps, as parts of a full step. A small one lets decoding rows ride along most often, a
# large one fills the matrix units.
CHUNK_PARTS = (128, 64, 32, 16, 8)
# Shares of the SMs that decode may have beside a prefill. On an H100 a quarter reads KV at three quarters of the whole
# GPU's rate, three eighths at nine tenths (results/published/h100-greenctx/sm_sweep.csv).
DECODE_SHARES = (0.25, 0.375)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """An SM split: the streams of its two sides."""

    prefill: torch.cuda.Stream
    decode: torch.cuda.Stream


def make_tuner(
    config: EngineConfig,
    steps: StepLimits,
    pool: KVPool,
    places: dict[str, Any],
    method: EvictionMethod | None,
    splits: dict[str, Split],
) -> Tuner | None:
    """None where nothing is decided from measurement."""
    if config.tuning == "off":
        return None
    chunks = prefill_budgets(steps.max_num_batched_tokens, method) if config.tuning == "all" else ()
    limits = Limits(
        max_seqs=steps.max_num_seqs,
        pool_bytes=(pool.num_pages - 1) * pool.page_bytes,
        bytes_per_token=pool.shape.bytes_per_token,
        places=tuple(places),
        chunks=chunks,
        splits=tuple(splits),
        tpot_s=config.tpot_bound_s,
    )
    tuner = Tuner(limits, measure(str(pool.device)).copy_bytes_s)
    known = known_costs(config, pool.shape.dtype, pool.device)
    if known is not None:
        tuner.observed.know(known)
    return tuner


def prefill_budgets(full: int, method: EvictionMethod | None) -> tuple[int, ...]:
    """Those of mixed steps, ascending: none where a method must see a prompt's queries all at once, else what is not
    smaller than the queries that it looks at."""
    if method is not None and method.needs & NEEDS_ALL_QUERIES:
        return ()
    least = max(1, method.window if method is not None else 1)
    return tuple(full // part for part in CHUNK_PARTS if full // part >= least)


def compression_places(
    config: EngineConfig, split: Partition, method: EvictionMethod | None, device: torch.device
) -> dict[str, torch.cuda.Stream | None]:
    """Where contexts may be compressed, by name, the fixed choice first; None is the main stream.

    Ratios that were given bind: compression stays on that partition. As a bound (`PartitionConfig.bound`) they leave
    the main stream, and a partition half as large, to choose from: not to compress after the prefill, beside decode
    steps, which wait for memory as compression does. Without a partition there is only the main stream.
    """
    if method is None or config.tuning == "off":
        return {}
    if device.type != "cuda" or not config.partition.enabled:
        return {INLINE: None}
    wanted = config.partition
    places = {INLINE: None} if wanted.bound else {}
    places[_name(BESIDE, split)] = split.compress
    if wanted.bound and split.available:
        half = dataclasses.replace(wanted, compress_ratio=wanted.compress_ratio / 2)
        try:
            smaller = partition(half, device)
        except UnsupportedCombination:
            smaller = split  # this device grants no smaller one
        places.setdefault(_name(BESIDE, smaller), smaller.compress)
    if not wanted.bound and method.needs <= DEFERRABLE_NEEDS:
        places[_name(AFTER, split)] = split.compress
    return places


def _name(place: str, split: Partition) -> str:
    granted = (split.granted_sms or {}).get("compress") if split.available else None
    return place if granted is None else f"{place}:{granted}"


def prefill_splits(
    config: EngineConfig, method: EvictionMethod | None, device: torch.device
) -> dict[str, Split]:
    """How prefill and decode may divide the SMs, by what each side was granted ("100+32"); none where a split binds or
    none is disjoint, where a method must see a prompt's queries all at once, or heads have budgets of their own."""
    wanted, compression = config.partition, config.compression
    free = config.tuning == "all" and device.type == "cuda" and wanted.enabled and wanted.bound
    alone = method is not None and (method.needs & NEEDS_ALL_QUERIES or compression.head_budgets is not None)
    if not free or alone:
        return {}
    splits = {}
    for share in DECODE_SHARES:
        try:
            made = partition(PartitionConfig(True, share, 1 - share, main_stream=True), device)
        except UnsupportedCombination as error:
            log.info("prefill and decode cannot have %s and %s of the SMs: %s", 1 - share, share, error)
            continue
        if made.available and made.exclusive:
            granted = made.granted_sms or made.requested_sms
            splits[f"{granted['main']}+{granted['compress']}"] = Split(made.main, made.compress)
    return splits
