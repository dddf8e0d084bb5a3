"""Storing new KV entries as one Triton kernel: keys and values of a token in one program.

An 8-bit pool is cast to while writing, clamped to its largest value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_kernel(
    new_k_ptr,
    new_v_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    page_size,
    kv_heads,
    LARGEST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    column = tl.arange(0, BLOCK)
    inside = column < kv_heads * DIM
    head, within = column // DIM, column % DIM
    target = ((slot // page_size * kv_heads + head) * page_size + slot % page_size) * DIM + within
    k = tl.load(new_k_ptr + token * k_stride + column, mask=inside)
    v = tl.load(new_v_ptr + token * v_stride + column, mask=inside)
    if LARGEST > 0:
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    k, v = k.to(keys_ptr.dtype.element_ty), v.to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + target, k, mask=inside)
    tl.store(values_ptr + target, v, mask=inside)


def write_kv(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slots: Tensor) -> None:
    """keys, values: one layer's pages (P, Hk, page_size, d). new_*: (T, Hk, d), heads contiguous. slots: (T,)."""
    _, kv_heads, page_size, dim = keys.shape
    _write_kernel[(new_keys.shape[0],)](
        new_keys,
        new_values,
        keys,
        values,
        slots,
        new_keys.stride(0),
        new_values.stride(0),
        page_size,
        kv_heads,
        LARGEST=torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else 0.0,
        DIM=dim,
        BLOCK=triton.next_power_of_2(kv_heads * dim),
        num_warps=4,
    )
