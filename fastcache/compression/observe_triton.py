"""`observe.py` as Triton kernels. Any strides, as long as a head's numbers lie side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Of the query statistics: two programs fit a multiprocessor of an H100. With fewer heads than this, several programs
# share the queries of one.
PROGRAMS = 256
MOMENTS = {"BLOCK": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
WIDE_MOMENTS = {"BLOCK": 32, "num_warps": 8, "num_stages": 1}
# Sizes that differ from step to step are not specialised: kernels would be compiled for them while requests wait.

# Tiles of the two attention kernels. Three programs of four warps share an SM, so that one multiplies while another
# takes exponentials; float32 has no tensor cores, and small tiles that fit the registers.
OPTIONS = (
    {"BLOCK": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 128, "BLOCK_M": 64, "num_warps": 4, "num_stages": 2},
)
WIDE_OPTIONS = (
    {"BLOCK": 32, "num_warps": 4, "num_stages": 1},
    {"BLOCK_N": 32, "BLOCK_M": 16, "num_warps": 4, "num_stages": 1},
)


@triton.jit
def _tile(ptr, entry, length, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(entries, d), zero from `length` on."""
    d = tl.arange(0, BLOCK_D)
    inside = (entry < length)[:, None] & (d < DIM)[None, :]
    return tl.load(ptr + entry[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["padded"])
def _lse_kernel(
    q_ptr,
    k_ptr,
    lengths_ptr,
    lse_ptr,
    heads,
    group,
    padded,
    q_batch,
    q_head,
    q_entry,
    k_batch,
    k_head,
    k_entry,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The softmax denominator of a block of queries, as a logarithm to base 2."""
    batch, head = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = _tile(q_ptr + batch * q_batch + head * q_head, m, length, q_entry, DIM, BLOCK_D)
    key_ptr = k_ptr + batch * k_batch + head // group * k_head
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.minimum((tl.program_id(1) + 1) * BLOCK, length), BLOCK):
        n = start + tl.arange(0, BLOCK)
        k = _tile(key_ptr, n, length, k_entry, DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(n[None, :] <= m[:, None], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), axis=1)
        top = higher
    out = lse_ptr + tl.program_id(0).to(tl.int64) * padded
    tl.store(out + m, top + tl.log2(total), mask=m < length)


@triton.jit(do_not_specialize=["padded"])
def _mass_kernel(
    q_ptr,
    k_ptr,
    lengths_ptr,
    lse_ptr,
    mass_ptr,
    heads,
    group,
    padded,
    q_batch,
    q_head,
    q_entry,
    k_batch,
    k_head,
    k_entry,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The mass of a block of keys under one query head: over all queries behind them. Early blocks see the most
    queries and come first."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    first = tl.program_id(1) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + batch * k_batch + head // group * k_head, n, length, k_entry, DIM, BLOCK_D)
    query_ptr = q_ptr + batch * q_batch + head * q_head
    lse_ptr += pair * padded
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, length, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = _tile(query_ptr, m, length, q_entry, DIM, BLOCK_D)
        lse = tl.load(lse_ptr + m, mask=m < length, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]
        total += tl.sum(tl.exp2(tl.where(n[:, None] <= m[None, :], s, float("-inf"))), axis=1)
    tl.store(mass_ptr + pair * padded + n, total, mask=n < padded)


def attention_mass(queries: Tensor, keys: Tensor, lengths: Tensor, lse: Tensor | None = None) -> Tensor:
    """As `observe.attention_mass`; with `lse` in one pass over queries and keys, else in two."""
    batch, heads, padded, dim = queries.shape
    assert queries.stride(3) == keys.stride(3) == 1
    shape = (heads, heads // keys.shape[1], padded)
    numbers = (*shape, *queries.stride()[:3], *keys.stride()[:3], dim**-0.5 * LOG2_E)
    lse_options, mass_options = WIDE_OPTIONS if queries.dtype.itemsize > 2 else OPTIONS
    sizes = {"DIM": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}
    if lse is None:
        lse = torch.empty((batch, heads, padded), dtype=torch.float32, device=keys.device)
        grid = (batch * heads, triton.cdiv(padded, lse_options["BLOCK"]))
        _lse_kernel[grid](queries, keys, lengths, lse, *numbers, **sizes, **lse_options)
    mass = torch.empty((batch, heads, padded), dtype=torch.float32, device=keys.device)
    grid = (batch * heads, triton.cdiv(padded, mass_options["BLOCK_N"]))
    _mass_kernel[grid](queries, keys, lengths, lse.contiguous(), mass, *numbers, **sizes, **mass_options)
    return mass


@triton.jit(do_not_specialize=["shares"])
def _moments_kernel(
    q_ptr,
    lengths_ptr,
    cos_sin_ptr,
    sums_ptr,
    moments_ptr,
    heads,
    shares,
    skipped,
    q_batch,
    q_head,
    q_entry,
    WIDE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What one share of a head's queries adds to the means of u and u u^T, u the unrotated queries, by halves."""
    pair, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // heads, pair % heads
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    query_ptr = q_ptr + batch * q_batch + head * q_head
    d, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    place = row[:, None] * q_entry + d[None, :]
    angle = row[:, None] * (2 * HALF) + d[None, :]
    # Summed over a program's rows only at its end: a sum across warps in every turn would hold all of them up.
    one_sum, two_sum = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, BLOCK_D), tl.float32)
    one_one = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    one_two = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    two_two = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    each = tl.cdiv(length, shares)
    end = tl.minimum(share * each + each, length)
    for start in range(share * each, end, BLOCK):
        m = start + row
        inside = ((m >= skipped) & (m < end))[:, None] & (d < HALF)[None, :]
        here, turn = query_ptr + tl.cast(start, tl.int64) * q_entry, cos_sin_ptr + start * (2 * HALF)
        a = tl.load(here + place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(here + HALF + place, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(turn + angle, mask=inside, other=0.0)
        sin = tl.load(turn + HALF + angle, mask=inside, other=0.0)
        one, two = a * cos + b * sin, b * cos - a * sin
        if not WIDE:
            one, two = one.to(q_ptr.dtype.element_ty), two.to(q_ptr.dtype.element_ty)
        one_sum += one.to(
            tl.float32
        )  # of what the products see, or a large mean would leave no true variance
        two_sum += two.to(tl.float32)
        one_one = tl.dot(tl.trans(one), one, one_one, input_precision="ieee")
        one_two = tl.dot(tl.trans(one), two, one_two, input_precision="ieee")
        two_two = tl.dot(tl.trans(two), two, two_two, input_precision="ieee")
    part = 1.0 / tl.maximum(length - skipped, 1).to(tl.float32)
    one_two *= part
    sums_ptr += (pair * shares + share) * (2 * HALF)
    tl.store(sums_ptr + d, tl.sum(one_sum, axis=0) * part, mask=d < HALF)
    tl.store(sums_ptr + HALF + d, tl.sum(two_sum, axis=0) * part, mask=d < HALF)
    moments_ptr += (pair * shares + share) * (4 * HALF * HALF)
    line, column = d[:, None] * (2 * HALF), d[None, :]
    inside = (d < HALF)[:, None] & (d < HALF)[None, :]
    tl.store(moments_ptr + line + column, one_one * part, mask=inside)
    tl.store(moments_ptr + line + HALF + column, one_two, mask=inside)
    tl.store(moments_ptr + line + 2 * HALF * HALF + column, tl.trans(one_two), mask=inside)
    tl.store(moments_ptr + line + 2 * HALF * HALF + HALF + column, two_two * part, mask=inside)


def query_statistics(queries: Tensor, lengths: Tensor, cos_sin: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """As `observe.query_statistics`; 16-bit queries are rounded to 16 bits again once rotated back."""
    batch, heads, _, dim = queries.shape
    assert queries.stride(3) == 1
    device, wide = queries.device, queries.dtype.itemsize > 2
    shares = max(1, PROGRAMS // (batch * heads))
    sums = torch.empty((batch, heads, shares, dim), dtype=torch.float32, device=device)
    moments = torch.empty((batch, heads, shares, dim, dim), dtype=torch.float32, device=device)
    _moments_kernel[(batch * heads, shares)](
        queries,
        lengths,
        cos_sin,
        sums,
        moments,
        heads,
        shares,
        first,
        *queries.stride()[:3],
        WIDE=wide,
        HALF=dim // 2,
        BLOCK_D=max(16, triton.next_power_of_2(dim // 2)),
        **(WIDE_MOMENTS if wide else MOMENTS),
    )
    mean = sums.sum(2)
    return mean, moments.sum(2).addcmul_(mean[..., None], mean[..., None, :], value=-1)
