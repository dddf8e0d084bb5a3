"""x W^T for the few rows of a decode step, as a Triton kernel: what counts is that the weights stream in.

A program multiplies all rows with a block of the weight's rows, which the copy engine brings in several tiles ahead.
It is used where such blocks fill the multiprocessors in whole turns, as those of gate and up do; elsewhere, and where a
residual is to be added, the library is as fast. `bench/decode_products.py` measures both beside the time that reading
the weights takes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows that one tile of the tensor cores takes. With half as many the library has kernels of its own.
FEWEST, MOST = 33, 64
# Weight rows and depth of a tile. Narrower blocks, for weights of few rows, gain nothing over the library.
BLOCK_N, BLOCK_K = 64, 128
# Of the last turn's multiprocessors so many may idle.
LEAST_FULL = 0.95
COPY_ENGINE = (9, 0)  # compute capability from which tiles are copied by hardware


@triton.jit
def _product_kernel(
    x, weight, out_ptr, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        total = tl.dot(x.load([0, k]), tl.trans(weight.load([first, k])), total)
    row = tl.arange(0, BLOCK_M)[:, None]
    place = row * columns + first + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=row < rows)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is to multiply, and not the library. x (T, k), weight (n, k)."""
    small = FEWEST <= x.shape[0] <= MOST and x.dtype.itemsize == 2 and x.is_contiguous()
    return small and _fits(*weight.shape, x.device)


@functools.cache
def _fits(columns: int, depth: int, device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < COPY_ENGINE or depth % BLOCK_K:
        return False
    return whole_turns(columns, properties.multi_processor_count)


def whole_turns(columns: int, processors: int) -> bool:
    """Whether blocks of columns give all processors work to the end."""
    blocks = columns // BLOCK_N
    return columns % BLOCK_N == 0 and blocks >= LEAST_FULL * processors * -(-blocks // processors)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """(T, n), sums in float32."""
    (rows, depth), columns = x.shape, weight.shape[0]
    out = x.new_empty(rows, columns)
    tiles = (
        TensorDescriptor.from_tensor(x, [MOST, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
    )
    _product_kernel[(columns // BLOCK_N,)](
        *tiles, out, rows, columns, depth,
        BLOCK_M=MOST, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
