"""The attention of a prompt's last queries without its weights: two passes over the keys, sums in float32.

The first pass finds each query's softmax statistics over a share of the keys, the second adds up the weights of a
block of keys over the queries of their KV head. Logits stay in float32, where `window.py` rounds them to the
model's type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastcache.compression.base import EvictionMethod, LayerKV

SHARES = 4  # programs that share the keys of one KV head in the first pass
BLOCK_N = 64


@triton.jit
def _logits(q, key_ptr, n, length, row, window, k_entry, scale, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(M, N) float32 logits in base 2 of query rows `row` against entries `n`, minus infinity on what is later."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(
        key_ptr + n[None, :].to(tl.int64) * k_entry + d[:, None],
        mask=(n < length)[None, :] & (d < DIM)[:, None],
        other=0.0,
    )
    s = tl.dot(q, k, input_precision="ieee") * scale
    last = length - window + row % window
    return tl.where(n[None, :] <= last[:, None], s, float("-inf"))


@triton.jit
def _queries(q_ptr, pair, row, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < DIM)[None, :]
    return tl.load(q_ptr + pair * rows * DIM + row[:, None] * DIM + d[None, :], mask=inside, other=0.0)


@triton.jit
def _statistics_kernel(
    q_ptr,
    k_ptr,
    lengths_ptr,
    max_ptr,
    sum_ptr,
    heads,
    rows,
    window,
    k_batch,
    k_head,
    k_entry,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
):
    pair, share = tl.program_id(0).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths_ptr + pair // heads).to(tl.int32)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _queries(q_ptr, pair, row, rows, DIM, BLOCK_D)
    key_ptr = k_ptr + pair // heads * k_batch + pair % heads * k_head
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    each = tl.cdiv(tl.cdiv(length, SHARES), BLOCK_N) * BLOCK_N
    for start in range(share * each, tl.minimum(share * each + each, length), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        s = _logits(q, key_ptr, n, length, row, window, k_entry, scale, DIM, BLOCK_D)
        higher = tl.maximum(top, tl.max(s, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), axis=1)
        top = higher
    out = (pair * SHARES + share) * rows + row
    tl.store(max_ptr + out, top, mask=row < rows)
    tl.store(sum_ptr + out, total, mask=row < rows)


@triton.jit(do_not_specialize=["padded"])
def _weights_kernel(
    q_ptr,
    k_ptr,
    lengths_ptr,
    lse_ptr,
    out_ptr,
    heads,
    rows,
    window,
    padded,
    k_batch,
    k_head,
    k_entry,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + pair // heads).to(tl.int32)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_ptr = k_ptr + pair // heads * k_batch + pair % heads * k_head
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = _queries(q_ptr, pair, row, rows, DIM, BLOCK_D)
        s = _logits(q, key_ptr, n, length, row, window, k_entry, scale, DIM, BLOCK_D)
        lse = tl.load(lse_ptr + pair * rows + row, mask=row < rows, other=float("inf"))
        total += tl.sum(tl.exp2(s - lse[:, None]), axis=0)
    tl.store(out_ptr + pair * padded + n, total / rows, mask=n < padded)


def window_mean(kv: LayerKV) -> Tensor:
    """(B, Hk, T) float32: weights of the window's queries, averaged over them and over the heads of a group."""
    queries, keys = kv.window_queries.contiguous(), kv.keys
    batch, query_heads, window, dim = queries.shape
    heads, padded = keys.shape[1], keys.shape[2]
    rows, pairs, device = query_heads // heads * window, batch * heads, keys.device
    assert keys.stride(3) == 1
    strides = (keys.stride(0), keys.stride(1), keys.stride(2), dim**-0.5 * 1.4426950408889634)
    sizes = {
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        # Without tensor cores a tile of float32 products must fit the registers.
        "BLOCK_M": min(128 if keys.dtype.itemsize == 2 else 16, max(16, triton.next_power_of_2(rows))),
        "BLOCK_N": BLOCK_N,
        "num_warps": 4,
    }
    top, total = torch.empty((2, pairs, SHARES, rows), dtype=torch.float32, device=device)
    _statistics_kernel[(pairs, triton.cdiv(rows, sizes["BLOCK_M"]), SHARES)](
        queries, keys, kv.lengths, top, total, heads, rows, window, *strides, SHARES=SHARES, **sizes
    )
    lse = torch.logsumexp((top + total.log2()) * 0.6931471805599453, 1) * 1.4426950408889634
    out = torch.empty((batch, heads, padded), dtype=torch.float32, device=device)
    _weights_kernel[(pairs, triton.cdiv(padded, BLOCK_N))](
        queries, keys, kv.lengths, lse, out, heads, rows, window, padded, *strides, **sizes
    )
    return out


def snapkv(method: EvictionMethod, kv: LayerKV) -> Tensor:
    """`SnapKV.importance`."""
    before_window = kv.positions < kv.lengths[:, None, None] - method.window
    mean = window_mean(kv).masked_fill(~before_window, 0.0)
    return F.avg_pool1d(mean, method.kernel, stride=1, padding=method.kernel // 2)


def tova(method: EvictionMethod, kv: LayerKV) -> Tensor:
    """`TOVA.importance`."""
    return window_mean(kv).mean(1, keepdim=True)
