"""What every provider of SM partitions shares: what it is asked, what it returns, how it fails."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Protocol

from fastcache.device.shim_symbols import OF_TORCH
from fastcache.device.sms import SmSplit

# Failure classes, from "nothing to be done here" to "the driver said no".
KINDS = (
    "cpu_torch",
    "no_driver",
    "no_gpu",
    "not_installed",
    "incomplete_install",
    "cuda_major_mismatch",
    "missing_system_lib",
    "abi_forwardable",
    "abi_refused",
    "shim_not_needed",
    "shim_build",
    "trial_failed",
    "too_old",
    "driver_error",
    "unexpected",
)


@dataclass(frozen=True)
class Pair:
    """Two streams of one split, as a provider made them. Streams are torch streams on `device`.

    `main` None: this provider caps the compression side only. `granted_*` None: the provider cannot say.
    `granted_from`: op (the operator's own return), driver (cuGreenCtxGetDevResource), none.
    `handles` belongs to the provider (what its `destroy` needs).
    """

    provider: str
    main: Any
    compress: Any
    granted_main: int | None
    granted_compress: int | None
    granted_from: str
    exclusive: bool
    handles: Any = None
    note: str | None = None


class ProviderError(Exception):
    """A provider cannot make this split. `kind` is one of KINDS; the message is one line with the true cause."""

    def __init__(self, kind: str, cause: str) -> None:
        assert kind in KINDS, kind
        super().__init__(" ".join(cause.split()))
        self.kind = kind


class Provider(Protocol):
    """One way to get a split. `create` raises ProviderError with the true cause, and only that."""

    name: str

    def create(self, device: int, split: SmSplit) -> Pair: ...

    def destroy(self, pair: Pair) -> None: ...


def cause_chain(error: BaseException) -> str:
    """The messages of an exception and everything it was raised from, deepest last, on one line."""
    messages, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return " <- ".join(" ".join(message.split()) for message in messages)


def classify(text: str) -> tuple[str, str]:
    """(kind, one-line cause) for the text of a failed load or call.

    The wheel's own sentence "Ensure CUDA Driver >= 12.4" is raised for every import failure and is never the
    reason; the loader's message behind it is.
    """
    text = text.partition("Error details from previous import attempts")[2] or text
    if found := re.search(r"undefined symbol: (\S+?)[\s,)]", text + " "):
        kind = "abi_refused" if OF_TORCH.search(found[1]) else "missing_system_lib"
        return kind, f"undefined symbol {found[1]}"
    if found := re.search(r"(lib[\w.+-]+?\.so[.\d]*): cannot open shared object file", text):
        return _missing_library(found[1])
    if found := re.search(r"version `(\S+)' not found", text):
        return "missing_system_lib", f"the system's libraries lack {found[1]}"
    if re.search(r"No CUDA GPUs are available|no CUDA-capable device|CUDA_ERROR_NO_DEVICE", text):
        return "no_gpu", "no CUDA device is visible"
    if found := re.search(r"(?:CUDA DRV call|CUDA_ERROR_|Not enough SMs|SM counts must)[^|]*", text):
        return "driver_error", found[0].strip()
    return "unexpected", text.strip()[:400]


def _missing_library(name: str) -> tuple[str, str]:
    if name.startswith("libcuda.so"):
        return "no_driver", f"{name} is not on this machine: no NVIDIA driver"
    if name.startswith(("libc10_cuda", "libtorch_cuda")):
        return "cpu_torch", f"{name} is missing: this torch is a CPU build"
    if re.match(r"lib(cudart|nvrtc|cublas|cublasLt)\.so\.\d+", name):
        return (
            "cuda_major_mismatch",
            f"{name} is missing: the wheel was built for another CUDA than this torch",
        )
    return "missing_system_lib", f"{name} is missing on this system"


def max_connections() -> str | None:
    """CUDA_DEVICE_MAX_CONNECTIONS: with 1, streams share one hardware queue and a split cannot run together."""
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
