"""`KeyDiff.importance` in two passes over the keys, in float32 without a float32 copy of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV

SHARES = 8  # programs that share the keys of one KV head
BLOCK_N = 64


@triton.jit
def _keys(key_ptr, n, end, k_entry, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys (N, d) in float32, zero beyond `end`, and what their norms divide by."""
    d = tl.arange(0, BLOCK_D)
    inside = (n < end)[:, None] & (d < DIM)[None, :]
    k = tl.load(key_ptr + n[:, None].to(tl.int64) * k_entry + d[None, :], mask=inside, other=0.0)
    k = k.to(tl.float32)
    return k, tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), 1e-12)


@triton.jit
def _anchor_kernel(
    k_ptr,
    lengths_ptr,
    out_ptr,
    heads,
    k_batch,
    k_head,
    k_entry,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
):
    """The sum of the directions of one share of a head's keys."""
    pair, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths_ptr + pair // heads).to(tl.int32)
    key_ptr = k_ptr + pair // heads * k_batch + pair % heads * k_head
    total = tl.zeros((BLOCK_D,), tl.float32)
    each = tl.cdiv(length, SHARES)
    end = tl.minimum(share * each + each, length)
    for start in range(share * each, end, BLOCK_N):
        k, norm = _keys(key_ptr, start + tl.arange(0, BLOCK_N), end, k_entry, DIM, BLOCK_D)
        total += tl.sum(k / norm[:, None], axis=0)
    d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + (pair * SHARES + share) * DIM + d, total, mask=d < DIM)


@triton.jit(do_not_specialize=["padded"])
def _cosine_kernel(
    k_ptr,
    lengths_ptr,
    anchor_ptr,
    out_ptr,
    heads,
    padded,
    k_batch,
    k_head,
    k_entry,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + pair // heads).to(tl.int32)
    key_ptr = k_ptr + pair // heads * k_batch + pair % heads * k_head
    d = tl.arange(0, BLOCK_D)
    anchor = tl.zeros((BLOCK_D,), tl.float32)
    for share in range(SHARES):
        anchor += tl.load(anchor_ptr + (pair * SHARES + share) * DIM + d, mask=d < DIM, other=0.0)
    anchor = anchor / tl.maximum(tl.sqrt(tl.sum(anchor * anchor, axis=0)), 1e-12)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, norm = _keys(key_ptr, n, length, k_entry, DIM, BLOCK_D)
    cosine = tl.sum(k / norm[:, None] * anchor[None, :], axis=1)
    tl.store(out_ptr + pair * padded + n, -cosine, mask=n < padded)


def keydiff(method: EvictionMethod, kv: LayerKV) -> Tensor:
    """`KeyDiff.importance`."""
    keys = kv.keys
    batch, heads, padded, dim = keys.shape
    assert keys.stride(3) == 1
    pairs, strides = batch * heads, keys.stride()[:3]
    sizes = {
        "DIM": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "BLOCK_N": BLOCK_N,
        "SHARES": SHARES,
        "num_warps": 4,
    }
    sums = torch.empty((pairs, SHARES, dim), dtype=torch.float32, device=keys.device)
    _anchor_kernel[(pairs, SHARES)](keys, kv.lengths, sums, heads, *strides, **sizes)
    out = torch.empty((batch, heads, padded), dtype=torch.float32, device=keys.device)
    _cosine_kernel[(pairs, triton.cdiv(padded, BLOCK_N))](
        keys, kv.lengths, sums, out, heads, padded, *strides, **sizes
    )
    return out
