"""A split through the CUDA driver API (cuda-bindings): two green contexts, a stream on each, and their teardown.

Nothing here touches torch, so it runs against any libcuda.so.1, a recorded one in the tests included.
Source: CUDA driver API 13.0, sections Green Contexts and Stream Management.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastcache.device.providers.base import ProviderError
from fastcache.device.sms import DeviceSms, SmSplit, by_capability

# Integers, because cuda-bindings renamed enums between 12.9 and 13.5.
NO_FLAGS = 0
DEFAULT_STREAM = 1
NON_BLOCKING = 1
PRIORITY = 0


@dataclass(frozen=True)
class Side:
    """One partition: its green context, its stream (both raw handles) and the SMs the driver says it has."""

    context: Any
    stream: int
    sms: int


def importable() -> str | None:
    """None, or why cuda-bindings cannot be used. Does not touch the driver."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed (pip install cuda-bindings)"
    return None


def device_sms(ordinal: int) -> DeviceSms:
    """SM count and granularity of one device, as the driver reports them. Errors: ProviderError."""
    cu = _driver()
    _call(cu, "cuInit", 0)
    device = _call(cu, "cuDeviceGet", ordinal)
    resource = _sm_resource(cu, device)
    major_key = cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    table = by_capability(resource.sm.smCount, _call(cu, "cuDeviceGetAttribute", major_key, device))
    # The two fields exist from the 13.0 driver on; older ones leave them 0 or absent.
    minimum = getattr(resource.sm, "minSmPartitionSize", 0) or table.minimum
    alignment = getattr(resource.sm, "smCoscheduledAlignment", 0) or table.alignment
    return DeviceSms(table.total, minimum, alignment, "driver")


def create(ordinal: int, split: SmSplit) -> tuple[Side, Side]:
    """(main, compress). On any failure everything made so far is destroyed. Errors: ProviderError."""
    cu = _driver()
    _call(cu, "cuInit", 0)
    device = _call(cu, "cuDeviceGet", ordinal)
    made: list[Any] = []
    streams: list[Any] = []
    try:
        group, rest = _resources(cu, device, split, made)
        sides = [_side(cu, device, resource, made, streams) for resource in (group, rest)]
    except ProviderError:
        _unwind(cu, streams, made)
        raise
    # The context that only served to leave SMs idle is no longer needed: the two sides hold their own.
    _unwind(cu, (), made[:-2])
    return tuple(sides) if split.group == "main" else tuple(reversed(sides))


def destroy(sides: Sequence[Side]) -> None:
    """Stream first, then its context: the other order leaks the stream. Errors: ProviderError."""
    cu = _driver()
    for side in sides:
        _call(cu, "cuStreamDestroy", cu.CUstream(side.stream))
        _call(cu, "cuGreenCtxDestroy", side.context)


def destroy_by_stream(streams: Sequence[int]) -> None:
    """Destroy streams whose contexts somebody else made: ask for the context before the stream is gone."""
    cu = _driver()
    for handle in streams:
        context = _call(cu, "cuStreamGetGreenCtx", cu.CUstream(handle))
        _call(cu, "cuStreamDestroy", cu.CUstream(handle))
        _call(cu, "cuGreenCtxDestroy", context)


def _resources(cu: Any, device: Any, split: SmSplit, made: list[Any]) -> tuple[Any, Any]:
    """SM resources of (group, rest), split from the device or, with idle SMs, from a first group of it."""
    resource = _sm_resource(cu, device)
    if split.idle:
        outer, _ = _split(cu, resource, split.main + split.compress)
        context = _context(cu, device, outer, made)
        kind = cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        resource = _call(cu, "cuGreenCtxGetDevResource", context, kind)
    return _split(cu, resource, split.group_size)


def _split(cu: Any, resource: Any, size: int) -> tuple[Any, Any]:
    groups, count, rest = _call(cu, "cuDevSmResourceSplitByCount", 1, resource, NO_FLAGS, size)
    if count != 1 or not groups:
        raise ProviderError(
            "driver_error", f"the driver made {count} groups of {size} SMs where 1 was asked for"
        )
    return groups[0], rest


def _side(cu: Any, device: Any, resource: Any, made: list[Any], streams: list[Any]) -> Side:
    context = _context(cu, device, resource, made)
    kind = cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    granted = _call(cu, "cuGreenCtxGetDevResource", context, kind).sm.smCount
    stream = _call(cu, "cuGreenCtxStreamCreate", context, NON_BLOCKING, PRIORITY)
    streams.append(stream)
    return Side(context, int(stream), granted)


def _context(cu: Any, device: Any, resource: Any, made: list[Any]) -> Any:
    descriptor = _call(cu, "cuDevResourceGenerateDesc", [resource], 1)
    made.append(_call(cu, "cuGreenCtxCreate", descriptor, device, DEFAULT_STREAM))
    return made[-1]


def _unwind(cu: Any, streams: Sequence[Any], contexts: Sequence[Any]) -> None:
    for stream in streams:
        cu.cuStreamDestroy(stream)
    for context in contexts:
        cu.cuGreenCtxDestroy(context)


def _sm_resource(cu: Any, device: Any) -> Any:
    return _call(cu, "cuDeviceGetDevResource", device, cu.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)


def _driver() -> Any:
    if cause := importable():
        raise ProviderError("not_installed", cause)
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ProviderError("not_installed", f"cuda-bindings cannot be imported: {error}") from error
    return driver


def _call(cu: Any, name: str, *arguments: Any) -> Any:
    """One driver call; its status is checked, and its results returned bare, as a tuple, or None."""
    function = getattr(cu, name, None)
    if function is None:
        raise ProviderError("too_old", f"this cuda-bindings has no {name}; version 12.9 or newer has it")
    try:
        status, *results = function(*arguments)
    except RuntimeError as error:
        # cuda-bindings raises RuntimeError, or a subclass, for a missing driver and for a missing function.
        missing = "dlopen" in str(error) or type(error).__name__ == "DynamicLibNotFoundError"
        kind = "no_driver" if missing else "too_old"
        raise ProviderError(kind, f"{name}: {type(error).__name__}: {error}") from error
    if int(status) != 0:
        raise ProviderError("driver_error", f"{name} failed with {getattr(status, 'name', status)}")
    return results[0] if len(results) == 1 else tuple(results) or None
