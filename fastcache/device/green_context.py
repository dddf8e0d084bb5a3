"""Split the GPU's SMs between the main and the compression stream, and say exactly what was granted.

`partition(config, device)` tries the providers in order; the first that works wins and every attempt is kept.
A pair is made once per (device, split) and cached for the process: each costs 11 to 15 MiB that even an ordered
teardown does not give back, so changing the split means picking another cached pair.

Where no provider works the streams are plain ones and the partition says so: a recorded fact with its reason,
an error only under `PartitionConfig.require`.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastcache.config import PartitionConfig
from fastcache.device import streams
from fastcache.device.partition import Partition
from fastcache.device.providers import cuda_bindings, driver_split, sgl, torch_green
from fastcache.device.providers.base import Pair, Provider, ProviderError
from fastcache.device.sms import DeviceSms, SmSplit, by_capability, plan_split
from fastcache.errors import UnsupportedCombination

logger = logging.getLogger(__name__)

PROVIDERS: tuple[Provider, ...] = (
    sgl.PACKAGE,
    sgl.SPATIAL,
    sgl.SHIMMED,
    cuda_bindings.PROVIDER,
    torch_green.PROVIDER,
)
PLAIN = "plain_streams"
OFF = "none"


@dataclass(frozen=True)
class _Made:
    """A cached outcome of the provider chain; `pair` None when only plain streams are left."""

    pair: Pair | None
    provider: Provider | None
    attempts: tuple[dict[str, Any], ...]


_cache: dict[tuple[int, SmSplit], _Made] = {}
_plain: dict[int, tuple[Any, Any]] = {}
_lock = threading.Lock()


def partition(config: PartitionConfig, device: Any) -> Partition:
    """The partition of `device` (a torch device, its name, or "cpu") for `config`.

    Errors: UnsupportedCombination when a requested count cannot be granted on this device (the message says what
    can), or when `config.require` and no provider gives what was asked.
    """
    index = _cuda_index(device)
    if not config.enabled:
        main, compress = _plain_streams(index) if index is not None else (None, None)
        reason = "green contexts are off in this configuration"
        return Partition(main, compress, OFF, False, False, False, reason)
    missing = _no_gpu(index)
    if missing is not None:
        return _fall_back(config, None, None, ({"provider": "cuda", "ok": False, **missing},))
    split = plan_split(device_sms(index), config.compress_ratio, config.main_ratio)
    made = _make_once(index, split)
    if made.pair is None:
        return _fall_back(config, index, split, made.attempts)
    return _partitioned(config, index, split, made)


def device_sms(index: int) -> DeviceSms:
    """SM count and granularity: from the driver where it can be asked, else by compute capability."""
    import torch

    try:
        return driver_split.device_sms(index)
    except ProviderError as error:
        logger.info("granularity by compute capability, the driver did not say: %s", error)
        properties = torch.cuda.get_device_properties(index)
        return by_capability(properties.multi_processor_count, properties.major)


def release_all() -> None:
    """Destroy every pair that can be destroyed and forget all. The caller has first stopped all work on them and
    dropped the CUDA graphs captured on them and the tensors and events used there."""
    with _lock:
        made = [each for each in _cache.values() if each.pair is not None]
        _cache.clear()
        _plain.clear()
        if not made:
            return
        import torch

        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        gc.collect()
        torch.cuda.empty_cache()
        for each in made:
            each.provider.destroy(each.pair)


def try_providers(
    index: int, split: SmSplit, providers: Sequence[Provider]
) -> tuple[Pair | None, Provider | None, tuple[dict[str, Any], ...]]:
    """The first provider's pair that works, and a record {provider, ok, kind, cause} of every one tried.

    A pair whose granted counts differ from the plan is still a real partition: it is kept and the row says what
    was granted.
    """
    attempts = []
    for provider in providers:
        try:
            pair = provider.create(index, split)
        except ProviderError as error:
            logger.info("green contexts: %s: %s", provider.name, error)
            attempts.append({"provider": provider.name, "ok": False, "kind": error.kind, "cause": str(error)})
            continue
        attempts.append({"provider": provider.name, "ok": True, "kind": None, "cause": None})
        return pair, provider, tuple(attempts)
    return None, None, tuple(attempts)


def _make_once(index: int, split: SmSplit) -> _Made:
    with _lock:
        key = (index, split)
        if key not in _cache:
            _cache[key] = _Made(*try_providers(index, split, PROVIDERS))
        return _cache[key]


def _partitioned(config: PartitionConfig, index: int, split: SmSplit, made: _Made) -> Partition:
    pair, reasons = made.pair, []
    whole = {"main": split.total, "compress": pair.granted_compress}
    granted = whole if pair.main is None else {"main": pair.granted_main, "compress": pair.granted_compress}
    main, exclusive, as_asked = pair.main, pair.exclusive, pair.exclusive or not config.main_stream
    if not config.main_stream:
        main, exclusive, granted = None, False, whole
        reasons.append("the main stream keeps the whole GPU (greenctx_main_stream is off)")
    if pair.note:
        reasons.append(f"{pair.provider}: {pair.note}")
    if not as_asked and config.require:
        raise UnsupportedCombination(
            f"require_greenctx: no disjoint pair on this machine; {_causes(made.attempts)}"
        )
    if main is None:
        main = _plain_streams(index)[0]
    return Partition(
        main,
        pair.compress,
        pair.provider,
        as_asked,
        exclusive,
        True,
        "; ".join(reasons) or None,
        {"main": split.requested_main, "compress": split.requested_compress},
        granted,
        made.attempts,
        pair.granted_from,
    )


def _fall_back(
    config: PartitionConfig, index: int | None, split: SmSplit | None, attempts: tuple[dict[str, Any], ...]
) -> Partition:
    reason = _causes(attempts)
    if config.require:
        raise UnsupportedCombination(
            f"require_greenctx is on and green contexts are not available: {reason}. "
            "`fastcache doctor` says what to install; require_greenctx: false records the fallback instead."
        )
    logger.warning("green contexts are not available: %s", reason)
    main, compress = _plain_streams(index) if index is not None else (None, None)
    requested = {"main": split.requested_main, "compress": split.requested_compress} if split else None
    provider = PLAIN if index is not None else OFF
    if index is not None:
        attempts = (*attempts, {"provider": PLAIN, "ok": True, "kind": None, "cause": None})
    return Partition(main, compress, provider, False, False, True, reason, requested, None, attempts)


def _causes(attempts: Sequence[dict[str, Any]]) -> str:
    """One line: each provider that failed and why."""
    failed = [attempt for attempt in attempts if not attempt["ok"]]
    if len(failed) == 1:
        return str(failed[0]["cause"])
    return "; ".join(f"{attempt['provider']}: {attempt['cause']}" for attempt in failed)


def _cuda_index(device: Any) -> int | None:
    """The CUDA ordinal of `device`, None for the CPU."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _no_gpu(index: int | None) -> dict[str, str] | None:
    """None when there is a CUDA device, else {kind, cause}."""
    import torch

    if index is None:
        build = f" (torch {torch.__version__} is a CPU build)" if torch.version.cuda is None else ""
        kind = "cpu_torch" if build else "no_gpu"
        return {"kind": kind, "cause": f"the device is a CPU, which has no SMs to split{build}"}
    if not torch.cuda.is_available():
        return {"kind": "no_gpu", "cause": "no CUDA device is visible to torch"}
    return None


def _plain_streams(index: int) -> tuple[Any, Any]:
    if index not in _plain:
        _plain[index] = streams.plain_pair(index)
    return _plain[index]
