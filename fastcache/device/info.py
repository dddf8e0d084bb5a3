"""What a run ran on: device, driver, host and package versions, without names or serial numbers of machines.

torch is imported inside the functions that need it, so versions can be told before it loads.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "fastcache",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "triton",
    "flashinfer-python",
    "sglang-kernel",
    "sgl-kernel",
)


def versions() -> dict[str, str | None]:
    """Python and the packages that decide numbers, by distribution name; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_info(device: str) -> dict[str, Any]:
    """The device named `device` ("cpu", "cuda", "cuda:1") and its host. Bytes, counts and names.

    On the CPU the device's memory is the host's, and there are no SMs.
    """
    host = {
        "cpu_model": cpu_model(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": _usable_threads(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
    }
    return (_cuda(device) if device.startswith("cuda") else _cpu()) | host


def peak_memory_bytes(device: str) -> int:
    """CUDA: most bytes torch ever had allocated on the device. CPU: the process's largest resident size."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(torch.device(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage speaks bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class OtherLoad:
    """How busy everybody else keeps the host's CPUs, from its creation on. A CPU measurement depends on it."""

    def __init__(self) -> None:
        self._start = self._clocks()

    def cores(self) -> float:
        """Mean number of CPU threads that other processes used since then."""
        wall, busy, own = (now - then for now, then in zip(self._clocks(), self._start, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    @staticmethod
    def _clocks() -> tuple[float, float, float]:
        every = psutil.cpu_times()
        idle = every.idle + getattr(every, "iowait", 0.0)
        return time.monotonic(), sum(every) - idle, time.process_time()


def cpu_model() -> str:
    """The processor's own name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the portable answer below is coarser
    return platform.processor() or platform.machine() or "unknown CPU"


def _cpu() -> dict[str, Any]:
    return {
        "kind": "cpu",
        "name": cpu_model(),
        "sm_count": None,
        "memory_bytes": psutil.virtual_memory().total,
        "compute_capability": None,
        "driver": None,
        "cuda": None,
    }


def _cuda(device: str) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "kind": "cuda",
        "name": properties.name,
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def driver_version() -> str | None:
    """The NVIDIA driver's version from the kernel module, else from nvidia-smi, else None."""
    module = Path("/sys/module/nvidia/version")
    if module.is_file():
        return module.read_text(encoding="ascii").strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


def _usable_threads() -> int | None:
    """Threads this process may run on, which a container or a job scheduler can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
