"""`ExpectedAttention.importance`, one pass over the keys for each query head: they are rotated, not the covariances."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.compression.base import LayerKV
from fastcache.compression.expected_attention import ExpectedAttention

BLOCK_N = 64
SHARES = 2  # programs that share the keys under one query head: its covariance stays with each


@triton.jit
def _logits_kernel(
    k_ptr,
    lengths_ptr,
    mean_ptr,
    cov_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    padded,
    k_batch,
    k_head,
    k_entry,
    scale,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mu^T k' / sqrt(d) + k'^T C k' / (2 d) for one query head and a share of its keys, k' = R^T k."""
    query_head = tl.program_id(0).to(tl.int64)
    batch, head = query_head // (heads * GROUP), query_head // GROUP % heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    half = d < HALF
    cos = tl.load(cos_ptr + batch * HALF + d, mask=half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + batch * HALF + d, mask=half, other=0.0)[None, :]
    mean_one = tl.load(mean_ptr + query_head * 2 * HALF + d, mask=half, other=0.0)[None, :] * scale
    mean_two = tl.load(mean_ptr + query_head * 2 * HALF + HALF + d, mask=half, other=0.0)[None, :] * scale
    square = half[:, None] & half[None, :]
    cov = cov_ptr + query_head * 4 * HALF * HALF + d[:, None] * 2 * HALF + d[None, :]
    halved = 0.5 * scale * scale
    one_one = tl.load(cov, mask=square, other=0.0) * halved
    one_two = tl.load(cov + HALF, mask=square, other=0.0) * (2.0 * halved)
    two_two = tl.load(cov + 2 * HALF * HALF + HALF, mask=square, other=0.0) * halved
    key_ptr = k_ptr + batch * k_batch + head * k_head + d[None, :]
    each = tl.cdiv(tl.cdiv(padded, SHARES), BLOCK_N) * BLOCK_N
    first = tl.program_id(1) * each
    for start in range(first, tl.minimum(first + each, padded), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < length)[:, None] & half[None, :]
        place = key_ptr + n[:, None].to(tl.int64) * k_entry
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
        one, two = a * cos + b * sin, b * cos - a * sin
        of_one = tl.dot(one, one_one, input_precision=PRECISION) + mean_one
        of_two = tl.dot(two, two_two, input_precision=PRECISION) + mean_two
        of_two = tl.dot(one, one_two, of_two, input_precision=PRECISION)
        tl.store(
            out_ptr + query_head * padded + n, tl.sum(of_one * one + of_two * two, axis=1), mask=n < padded
        )


def expected_attention(method: ExpectedAttention, kv: LayerKV) -> Tensor:
    """`ExpectedAttention.importance`; in TF32 for 16-bit keys."""
    keys = kv.keys
    batch, heads, padded, dim = keys.shape
    assert keys.stride(3) == 1
    query_heads = kv.query_mean.shape[1]
    cos, sin = (x.contiguous() for x in method.future_rotation(kv))
    logits = torch.empty((batch, query_heads, padded), dtype=torch.float32, device=keys.device)
    _logits_kernel[(batch * query_heads, SHARES)](
        keys,
        kv.lengths,
        kv.query_mean.contiguous(),
        kv.query_cov.contiguous(),
        cos,
        sin,
        logits,
        heads,
        padded,
        *keys.stride()[:3],
        dim**-0.5,
        GROUP=query_heads // heads,
        HALF=dim // 2,
        BLOCK_D=max(16, triton.next_power_of_2(dim // 2)),
        BLOCK_N=BLOCK_N,
        SHARES=SHARES,
        PRECISION="ieee" if keys.dtype.itemsize > 2 else "tf32",
        num_warps=4,
        num_stages=1,
    )
    return method.weigh(logits, kv)
