"""What test_compression_kernels.py compiles for an H100 in a process of its own, without one.

Every launch goes as far as machine code, with the arguments, the options and the strides that the engine gives it.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from fastcache.compression import kernels, layer
from fastcache.compression.cost_inputs import StepInputs, StepShape
from fastcache.compression.registry import create
from fastcache.config import CompressionConfig
from fastcache.kvcache import gather_triton, pool
from fastcache.kvcache.head_layout import HeadLayout, HeadRows, upload_layouts
from fastcache.kvcache.pool import KVPool, KVShape

CPU, PACKED, PAGED = torch.device("cpu"), (False,), (False, True)
# Query heads and the ways a context of each method reaches it; every number of queries per KV head once.
METHODS = {
    "keydiff": (8, PAGED),
    "snapkv": (32, PAGED),
    "tova": (24, PAGED),
    "h2o": (32, PACKED),
    "expected_attention": (32, PACKED),
}
launched: list[str] = []
versions: set[str] = set()
run_kernel = jit.JITFunction.run


class NoDevice:
    """A driver that knows what to compile for and nothing else."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compiled(kernel, *arguments, grid, warmup, **options):
    found = run_kernel(kernel, *arguments, grid=grid, warmup=True, **options)
    assert found.asm["cubin"]
    versions.add(found.hash)
    launched.append(kernel.fn.__name__)


def compress(dtype, name, heads, paged, context=150, sequences=3):
    shape = StepShape(2, heads, 8, 128, dtype, context, sequences, ratio=0.5, paged=paged)
    method = create(CompressionConfig(method=name))
    pool.gather_pages = gather_triton.gather_pages
    StepInputs(method, shape, CPU).layer(1)


def copy_pages(stored):
    made = KVPool(KVShape(2, 8, 128, torch.bfloat16, stored), 20, 16, CPU)
    table, kept = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 8, 20, dtype=torch.int64)
    heads = HeadRows(upload_layouts([HeadLayout(torch.full((2, 8), 9).numpy(), 16)] * 2, CPU), 1, 8)
    fast = kernels.triton_kernels()
    gather_triton.gather_pages(made.keys[1], table, 50, torch.bfloat16)
    fast.repack_pages(made, 1, table, kept, table)
    fast.repack_heads_pages(made, heads, table, kept, table)
    k = torch.zeros(100, 8, 128, dtype=torch.bfloat16)
    starts = torch.tensor([0, 50])
    fast.repack(made.keys[1], made.values[1], k, k, starts, kept, table)
    k = k.unflatten(0, (2, 50)).transpose(1, 2)
    fast.repack_heads(made, heads, k, k, kept, table)


if __name__ == "__main__":
    driver.set_active(NoDevice())
    jit.JITFunction.run = compiled
    layer.kernels_for = lambda device: kernels.triton_kernels()
    for name, (heads, ways) in METHODS.items():
        for paged in ways:
            compress(torch.bfloat16, name, heads, paged)
    compress(torch.float32, "expected_attention", 32, False)
    for stored in (torch.bfloat16, torch.float8_e4m3fn):
        copy_pages(stored)
    wanted = "_select _gather _repack _anchor _cosine _statistics _weights _mass _moments _logits"
    assert set(launched) == {f"{name}_kernel" for name in wanted.split()}, launched
    # A length that is a multiple of 16 and one that is not, one context and several: the same machine code. A server
    # would stand still for each version that it meets first under load.
    known = set(versions)
    for name, (heads, _) in METHODS.items():
        for context, sequences in ((144, 3), (151, 1), (158, 2)):
            compress(torch.bfloat16, name, heads, False, context, sequences)
    assert versions == known, f"{len(versions - known)} more versions for other lengths"
