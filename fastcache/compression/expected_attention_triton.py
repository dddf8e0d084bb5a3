"""`ExpectedAttention.importance` with one pass over the keys: they are rotated instead of the covariances."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.compression.base import LayerKV
from fastcache.compression.expected_attention import ExpectedAttention

BLOCK_N = 64


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
    PRECISION: tl.constexpr,
):
    """mu^T k' / sqrt(d) + k'^T C k' / (2 d) of a block of keys, k' = R^T k, for each query head of their group."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    half = d < HALF
    inside = (n < length)[:, None] & half[None, :]
    place = k_ptr + batch * k_batch + head * k_head + n[:, None].to(tl.int64) * k_entry + d[None, :]
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + batch * HALF + d, mask=half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + batch * HALF + d, mask=half, other=0.0)[None, :]
    one, two = a * cos + b * sin, b * cos - a * sin
    square = half[:, None] & half[None, :]
    for g in range(GROUP):
        query_head = pair * GROUP + g
        mean_one = tl.load(mean_ptr + query_head * 2 * HALF + d, mask=half, other=0.0)[None, :]
        mean_two = tl.load(mean_ptr + query_head * 2 * HALF + HALF + d, mask=half, other=0.0)[None, :]
        logit = tl.sum(one * mean_one + two * mean_two, axis=1) * scale
        cov = cov_ptr + query_head * 4 * HALF * HALF + d[:, None] * 2 * HALF + d[None, :]
        one_one = tl.load(cov, mask=square, other=0.0)
        one_two = tl.load(cov + HALF, mask=square, other=0.0)
        two_two = tl.load(cov + 2 * HALF * HALF + HALF, mask=square, other=0.0)
        spread = tl.dot(one, one_one, input_precision=PRECISION) * one
        half_two = tl.dot(two, two_two, input_precision=PRECISION)
        half_two = tl.dot(one, 2.0 * one_two, half_two, input_precision=PRECISION)
        logit += tl.sum(spread + half_two * two, axis=1) * (0.5 * scale * scale)
        tl.store(out_ptr + query_head * padded + n, logit, mask=n < padded)


def expected_attention(method: ExpectedAttention, kv: LayerKV) -> Tensor:
    """`ExpectedAttention.importance`; in TF32 for 16-bit keys."""
    keys = kv.keys
    batch, heads, padded, dim = keys.shape
    assert keys.stride(3) == 1
    query_heads = kv.query_mean.shape[1]
    cos, sin = (x.contiguous() for x in method.future_rotation(kv))
    logits = torch.empty((batch, query_heads, padded), dtype=torch.float32, device=keys.device)
    _logits_kernel[(batch * heads, triton.cdiv(padded, BLOCK_N))](
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
        PRECISION="ieee" if keys.dtype.itemsize > 2 else "tf32",
        num_warps=8,  # three float32 tiles spill from the registers of four
        num_stages=1,
    )
    return method.weigh(logits, kv)
