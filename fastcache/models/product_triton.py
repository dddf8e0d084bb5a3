"""x W^T for the few rows of a decode step, as a Triton kernel: what counts is that the weights stream in.

A program multiplies all rows with a block of the weight's rows, which the copy engine brings in several tiles ahead.
It is used where such blocks fill the multiprocessors in whole turns, and left to the library elsewhere, which is faster
there. `bench/decode_products.py` measures both beside the time that reading the weights takes.
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
BLOCK_K = 128
STAGES = {64: 4, 32: 5}  # by the weight rows of a block: what fits into shared memory
# Of the last turn's multiprocessors so many may idle.
LEAST_FULL = 0.95
COPY_ENGINE = (9, 0)  # compute capability from which tiles are copied by hardware


@triton.jit
def _product_kernel(
    x, weight, out_ptr, rows, columns, depth,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        total = tl.dot(x.load([0, k]), tl.trans(weight.load([first, k])), total)
    row = tl.arange(0, BLOCK_M)[:, None]
    place = row * columns + first + tl.arange(0, BLOCK_N)[None, :]
    if ADD:
        total += tl.load(out_ptr + place, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=row < rows)


def product_columns(x: Tensor, weight: Tensor) -> int | None:
    """Weight rows per program, or None where the library is to multiply. x (T, k), weight (n, k)."""
    if not FEWEST <= x.shape[0] <= MOST or x.dtype.itemsize != 2 or not x.is_contiguous():
        return None
    return _columns(*weight.shape, x.device)


@functools.cache
def _columns(columns: int, depth: int, device: torch.device) -> int | None:
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < COPY_ENGINE or depth % BLOCK_K:
        return None
    return whole_turns(columns, properties.multi_processor_count)


def whole_turns(columns: int, processors: int) -> int | None:
    """The largest block of columns that gives all processors work to the end."""
    for block in STAGES:
        blocks = columns // block
        if columns % block == 0 and blocks >= LEAST_FULL * processors * -(-blocks // processors):
            return block
    return None


def product(x: Tensor, weight: Tensor, columns: int, residual: Tensor | None = None) -> Tensor:
    """(T, n), sums in float32; added to `residual` in place where it is given. columns: from `product_columns`."""
    rows, depth = x.shape
    out = x.new_empty(rows, weight.shape[0]) if residual is None else residual
    tiles = (
        TensorDescriptor.from_tensor(x, [MOST, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [columns, BLOCK_K]),
    )
    _product_kernel[(weight.shape[0] // columns,)](
        *tiles, out, rows, weight.shape[0], depth,
        ADD=residual is not None, BLOCK_M=MOST, BLOCK_N=columns, BLOCK_K=BLOCK_K,
        num_warps=4, num_stages=STAGES[columns],
    )  # fmt: skip
    return out
