"""What an engine may choose from while it runs: the places where compression can go, each with its stream, and the
tuner that chooses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastcache.compression.base import EvictionMethod
from fastcache.config import EngineConfig
from fastcache.device.ceilings import measure
from fastcache.device.green_context import partition
from fastcache.device.partition import Partition
from fastcache.engine.chunks import Limits as StepLimits
from fastcache.engine.deferred import DEFERRABLE_NEEDS
from fastcache.engine.policy import AFTER, BESIDE, INLINE, Limits
from fastcache.engine.tuner import Tuner
from fastcache.errors import UnsupportedCombination
from fastcache.kvcache.pool import KVPool

# Prefill budgets of mixed steps, as parts of a full step.
CHUNK_PARTS = (16, 8, 4)


def make_tuner(config: EngineConfig, steps: StepLimits, pool: KVPool, places: dict[str, Any]) -> Tuner | None:
    """None where nothing is decided from measurement."""
    if config.tuning == "off":
        return None
    parts = CHUNK_PARTS if config.tuning == "all" else ()
    chunks = (steps.max_num_batched_tokens // part for part in parts)
    limits = Limits(
        max_seqs=steps.max_num_seqs,
        pool_bytes=(pool.num_pages - 1) * pool.page_bytes,
        bytes_per_token=pool.shape.bytes_per_token,
        places=tuple(places),
        chunks=tuple(chunk for chunk in chunks if chunk > 0),
    )
    return Tuner(limits, measure(str(pool.device)).copy_bytes_s)


def compression_places(
    config: EngineConfig, split: Partition, method: EvictionMethod | None, device: torch.device
) -> dict[str, torch.cuda.Stream | None]:
    """Where contexts may be compressed, by name, the fixed choice first; None is the main stream.

    Ratios that were given bind: compression stays on that partition. As a bound (`PartitionConfig.bound`) they leave
    the main stream, and a partition half as large, to choose from. Without a partition there is only the main stream.
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
    if method.needs <= DEFERRABLE_NEEDS:
        places[_name(AFTER, split)] = split.compress
    return places


def _name(place: str, split: Partition) -> str:
    granted = (split.granted_sms or {}).get("compress") if split.available else None
    return place if granted is None else f"{place}:{granted}"
