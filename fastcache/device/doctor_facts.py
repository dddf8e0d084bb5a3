"""What the doctor looks at, gathered once: the facts of this environment that decide what can run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from fastcache.config import PartitionConfig
from fastcache.device import green_context, info, sgl_install, shim
from fastcache.device.providers import driver_split
from fastcache.device.shim_plan import ShimPlan, plan, torch_facts
from fastcache.device.shim_symbols import matching_wheel

# Attention backend -> the module it needs beyond torch. The reference backend runs everywhere.
ATTENTION = {"torch-sdpa": "torch", "flashinfer": "flashinfer"}
TRIED_RATIOS = (0.25, 0.75)


@dataclass(frozen=True)
class Facts:
    """The environment as found. Everything is plain data, so a diagnosis can be tested without the machine."""

    python: str
    torch: str
    torch_cuda: str | None
    gpu: str | None
    capability: str | None
    driver: str | None
    cuda_visible: bool
    attention: dict[str, bool]
    sgl_version: str | None
    sgl_complete: bool | None
    sgl_match: str | None
    cuda_bindings: str | None
    granularity: dict[str, Any] | None
    shim: dict[str, Any]
    compiler: str | None
    provider: str | None
    provider_reason: str | None
    attempts: list[dict[str, Any]] = field(default_factory=list)
    max_connections: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gather() -> Facts:
    """Look at this environment. On a GPU this makes one small split, as a run would. Errors: none expected."""
    import torch

    versions, install = info.versions(), sgl_install.find()
    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else None
    partition = green_context.partition(
        PartitionConfig(True, *TRIED_RATIOS, main_stream=True), "cuda" if gpu else "cpu"
    )
    return Facts(
        python=str(versions["python"]),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpu=torch.cuda.get_device_name() if gpu else None,
        capability=".".join(map(str, capability)) if capability else None,
        driver=info.driver_version(),
        cuda_visible=gpu,
        attention={name: importlib.util.find_spec(module) is not None for name, module in ATTENTION.items()},
        sgl_version=install.version if install else None,
        sgl_complete=install.complete if install else None,
        sgl_match=matching_wheel(torch.__version__),
        cuda_bindings=None if driver_split.importable() else _bindings_version(),
        granularity=vars(green_context.device_sms(torch.cuda.current_device())) if gpu else None,
        shim=_shim_state(plan(install, torch_facts(), capability=capability)),
        compiler=_compiler(),
        provider=partition.provider,
        provider_reason=partition.reason,
        attempts=[dict(attempt) for attempt in partition.attempts],
        max_connections=os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
    )


def _shim_state(shim_plan: ShimPlan) -> dict[str, Any]:
    built = (
        shim_plan.status == "needed" and (shim.cache_folder() / "shims" / shim_plan.key / shim.NAME).is_file()
    )
    return {
        "status": "built" if built else shim_plan.status,
        "reason": shim_plan.reason,
        "forwarded": len(shim_plan.forwards),
        "refused": dict(shim_plan.refused),
    }


def _bindings_version() -> str:
    try:
        return metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:
        return "unknown"  # importable without distribution metadata


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else list(shim.COMPILERS)
    return next((found for name in names if (found := shutil.which(name))), None)
