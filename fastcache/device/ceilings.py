"""What this device can do at most, measured: bytes per second of a copy, FLOP/s of a matrix product.

A rate in a row means something only beside these two: prefill is bound by the products (MFU, the share of the
product's FLOP/s), decode by the bytes it reads (MBU, the share of the copy's bytes per second). A fraction of a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# CUDA: the copy is far larger than any cache and the product fills every SM, if a quarter of the free memory allows
# (a KV pool may have taken the rest). CPU: larger than its caches, and over in a tenth of a second.
CUDA_COPY_BYTES, CUDA_PRODUCT = 2**31, (16384, 4096, 24576)
CPU_COPY_BYTES, CPU_PRODUCT = 2**27, (512, 512, 2048)
FREE_SHARE = 4
REPEATS = 9


@dataclass(frozen=True)
class Ceilings:
    """`copy_bytes_s` counts bytes read and bytes written. `gemm_flop_s` counts a multiply-add as two, in `dtype`."""

    copy_bytes_s: float
    gemm_flop_s: float
    dtype: str

    def __str__(self) -> str:
        return f"copy {self.copy_bytes_s / 1e12:.3g} TB/s, {self.dtype} product {self.gemm_flop_s / 1e12:.3g} TFLOP/s"


def measure(device: str) -> Ceilings:
    """The ceilings of "cpu" (float32) or of a CUDA device (bfloat16); medians of a few runs after an untimed one.

    Leaves no memory allocated; on CUDA torch's peak counts from here on.
    """
    import torch

    if device.startswith("cuda"):
        with torch.cuda.device(torch.device(device)):
            return _cuda(torch)
    return _measure(torch, CPU_COPY_BYTES, CPU_PRODUCT, torch.float32, _host_seconds)


def _cuda(torch: Any) -> Ceilings:
    torch.cuda.empty_cache()
    share = torch.cuda.mem_get_info()[0] // FREE_SHARE
    copy_bytes, (n, k, m) = CUDA_COPY_BYTES, CUDA_PRODUCT
    while copy_bytes > share:
        copy_bytes //= 2
    while 2 * (n * k + k * m + n * m) > share:
        n, m = n // 2, m // 2
    found = _measure(torch, copy_bytes, (n, k, m), torch.bfloat16, _event_seconds)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return found


def _measure(
    torch: Any, copy_bytes: int, sizes: tuple[int, int, int], dtype: Any, seconds: Callable[..., float]
) -> Ceilings:
    n, k, m = sizes
    place = "cuda" if dtype == torch.bfloat16 else "cpu"
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=place)
    copy_s = seconds(torch, torch.empty_like(source).copy_, source)
    del source
    x, w = (torch.randn(shape, device=place, dtype=dtype) for shape in ((n, k), (m, k)))
    product_s = seconds(torch, torch.nn.functional.linear, x, w)
    return Ceilings(2 * copy_bytes / copy_s, 2 * n * k * m / product_s, str(dtype).removeprefix("torch."))


def _event_seconds(torch: Any, run: Callable[..., Any], *args: Any) -> float:
    run(*args)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*args)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _host_seconds(torch: Any, run: Callable[..., Any], *args: Any) -> float:
    run(*args)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
