"""`ExpectedAttention.importance`: a program turns a query head's covariance once, and keys pass by as they are stored.

With R the mean rotation to the positions that are to come, q^T k has the mean mu^T k' and the variance k'^T C k',
k' = R^T k; the same numbers are (R mu)^T k and k^T (R C R^T) k. Turning C, of d x d, costs what turning d keys does.

Products: C is symmetric, so that three quarters of d^2 multiply-adds per key and query head do. At 8 x 3968 tokens of
Qwen3-8B (32 heads, 36 layers, d 128) that is 2 x 12,288 x 31,744 x 32 x 36 = 0.90e12 operations, about 1.2 ms at
780 TFLOP/s. With 16-bit keys the turned covariance is rounded to their type and sums are kept in float32: keys are
exact then, where TF32 would take them turned, and so rounded, at half the rate and twice the shared memory. Float32
keys are multiplied in float32, without tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.compression.base import LayerKV
from fastcache.compression.expected_attention import ExpectedAttention

# Three programs fit a multiprocessor of an H100 (registers are capped at what that leaves them, and none spills).
OPTIONS = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 168}
WIDE_OPTIONS = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
# Sizes that differ from step to step are not specialised: kernels would be compiled for them while requests wait.
PROGRAMS = 768  # where there are fewer query heads than this, several programs share the keys of one


@triton.jit
def _turned_covariance(cov_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """The quarters (1, 1), (1, 2) and (2, 2) of R C R^T."""
    d = tl.arange(0, BLOCK_D)
    half = d < HALF
    cos = tl.load(cos_ptr + d, mask=half, other=0.0)
    sin = tl.load(sin_ptr + d, mask=half, other=0.0)
    square = half[:, None] & half[None, :]
    quarter = cov_ptr + d[:, None] * 2 * HALF + d[None, :]
    one_one = tl.load(quarter, mask=square, other=0.0)
    one_two = tl.load(quarter + HALF, mask=square, other=0.0)
    two_one = tl.load(quarter + 2 * HALF * HALF, mask=square, other=0.0)
    two_two = tl.load(quarter + 2 * HALF * HALF + HALF, mask=square, other=0.0)
    upper_one = one_one * cos[:, None] - two_one * sin[:, None]
    upper_two = one_two * cos[:, None] - two_two * sin[:, None]
    lower_one = two_one * cos[:, None] + one_one * sin[:, None]
    lower_two = two_two * cos[:, None] + one_two * sin[:, None]
    return (
        upper_one * cos[None, :] - upper_two * sin[None, :],
        upper_two * cos[None, :] + upper_one * sin[None, :],
        lower_two * cos[None, :] + lower_one * sin[None, :],
    )


@triton.jit(do_not_specialize=["padded", "shares"])
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
    shares,
    k_batch,
    k_head,
    k_entry,
    scale,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(R mu)^T k / sqrt(d) + k^T R C R^T k / (2 d) for one query head and a share of its keys."""
    query_head = tl.program_id(0).to(tl.int64)
    batch, head = query_head // (heads * GROUP), query_head // GROUP % heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    cos_ptr += batch * HALF
    sin_ptr += batch * HALF
    cov_ptr += query_head * 4 * HALF * HALF
    mean_ptr += query_head * 2 * HALF
    dtype = k_ptr.dtype.element_ty
    one_one, one_two, two_two = _turned_covariance(cov_ptr, cos_ptr, sin_ptr, HALF, BLOCK_D)
    halved = 0.5 * scale * scale
    one_one = (one_one * halved).to(dtype)
    one_two = (one_two * (2.0 * halved)).to(dtype)
    two_two = (two_two * halved).to(dtype)

    d, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    half = d < HALF
    cos = tl.load(cos_ptr + d, mask=half, other=0.0) * scale
    sin = tl.load(sin_ptr + d, mask=half, other=0.0) * scale
    first = tl.load(mean_ptr + d, mask=half, other=0.0)
    second = tl.load(mean_ptr + HALF + d, mask=half, other=0.0)
    mean_one, mean_two = first * cos - second * sin, second * cos + first * sin

    each = tl.cdiv(tl.cdiv(padded, shares), BLOCK_N) * BLOCK_N
    begin = tl.program_id(1) * each
    key_ptr = k_ptr + batch * k_batch + head * k_head
    place = row[:, None].to(tl.int64) * k_entry + d[None, :]
    for start in range(begin, tl.minimum(begin + each, padded), BLOCK_N):
        n = start + row
        inside = (n < length)[:, None] & half[None, :]
        here = key_ptr + tl.cast(start, tl.int64) * k_entry
        one = tl.load(here + place, mask=inside, other=0.0)
        two = tl.load(here + HALF + place, mask=inside, other=0.0)
        of_one = tl.dot(one, one_one, input_precision="ieee") + mean_one[None, :]
        of_two = tl.dot(one, one_two, input_precision="ieee")
        of_two = tl.dot(two, two_two, of_two, input_precision="ieee") + mean_two[None, :]
        logit = tl.sum(of_one * one.to(tl.float32) + of_two * two.to(tl.float32), axis=1)
        tl.store(out_ptr + query_head * padded + n, logit, mask=n < padded)


def expected_attention(method: ExpectedAttention, kv: LayerKV) -> Tensor:
    """`ExpectedAttention.importance`."""
    keys = kv.keys
    batch, heads, padded, dim = keys.shape
    assert keys.stride(3) == 1
    query_heads = kv.query_mean.shape[1]
    cos, sin = (x.contiguous() for x in method.future_rotation(kv))
    logits = torch.empty((batch, query_heads, padded), dtype=torch.float32, device=keys.device)
    shares = max(1, PROGRAMS // (batch * query_heads))
    _logits_kernel[(batch * query_heads, shares)](
        keys,
        kv.lengths,
        kv.query_mean.contiguous(),
        kv.query_cov.contiguous(),
        cos,
        sin,
        logits,
        heads,
        padded,
        shares,
        *keys.stride()[:3],
        dim**-0.5,
        GROUP=query_heads // heads,
        HALF=dim // 2,
        BLOCK_D=max(16, triton.next_power_of_2(dim // 2)),
        **(WIDE_OPTIONS if keys.dtype.itemsize > 2 else OPTIONS),
    )
    return method.weigh(logits, kv)
