"""`merge.merge_layer` in three Triton kernels per layer, straight into fresh pages: 16-bit caches on CUDA.

Nothing but the merged entries is written: a program reads the groups of some kept slots of one head, turns keys back
in registers, multiplies through the three linear layers in float32 sums, turns merged keys on and stores them.

The mean that is added to a network's output is read apart: with tiles that products and a sum share, the compiler of
Triton 3.6 let tiles be overwritten too early, for some block sizes.

Lower bound of one layer, N tokens, Hk heads of size d, k entries per group, h the networks' width, c bytes a value:
reads 2 N Hk d c and writes 2 N Hk d c / k bytes; 4 N Hk / k x (k d h + h h + h d) floating-point operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.compression.merge import KINDS, MergeLayout, MergePlan, Net

SLOTS = 64
# Shared memory and registers hold tiles of these sizes at most.
MAX_WIDTH, MAX_HEAD = 256, 256


@triton.jit
def _turn(first, second, cos_sin_ptr, position, column, inside, HALF: tl.constexpr, DIRECTION: tl.constexpr):
    """Halves of (slots, d) in float32, turned by the angles of each slot's position."""
    angle = (position * 2 * HALF)[:, None] + column[None, :]
    cos = tl.load(cos_sin_ptr + angle, mask=inside, other=1.0).to(tl.float32)
    sin = DIRECTION * tl.load(cos_sin_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _put(pages_ptr, target, value, inside, LARGEST: tl.constexpr):
    if LARGEST > 0:
        value = tl.clamp(value, -LARGEST, LARGEST)
    tl.store(pages_ptr + target, value.to(pages_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(x_ptr, entry, x_entry, column, inside, HALF: tl.constexpr):
    place = (entry * x_entry)[:, None] + column[None, :]
    return tl.load(x_ptr + place, mask=inside, other=0.0), tl.load(
        x_ptr + place + HALF, mask=inside, other=0.0
    )


@triton.jit(do_not_specialize=["slots", "table_width"])
def _merge_kernel(
    x_ptr,
    pages_ptr,
    first_ptr,
    kinds_ptr,
    fresh_ptr,
    cos_sin_ptr,
    w0_ptr,
    b0_ptr,
    w3_ptr,
    b3_ptr,
    w6_ptr,
    b6_ptr,
    x_batch,
    x_head,
    x_entry,
    heads,
    slots,
    table_width,
    page_size,
    KIND: tl.constexpr,
    FACTOR: tl.constexpr,
    TURNED: tl.constexpr,
    MEAN: tl.constexpr,
    LARGEST: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    mine = tl.load(kinds_ptr + batch * slots + slot, mask=slot < slots, other=-1) == KIND
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    start = tl.load(first_ptr + batch * slots + slot, mask=mine, other=0)
    column, unit = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_WIDTH)
    inside = mine[:, None] & (column < HALF)[None, :]
    real = unit < WIDTH
    dtype = x_ptr.dtype.element_ty
    x_ptr += batch * x_batch + head * x_head

    # Columns of W0 as rows of a product's right side: (half, width).
    into = unit[None, :] * (FACTOR * 2 * HALF) + column[:, None]
    fits = real[None, :] & (column < HALF)[:, None]
    hidden = tl.zeros((SLOTS, BLOCK_WIDTH), tl.float32)
    for j in range(FACTOR):
        a, b = _halves(x_ptr, start + j, x_entry, column, inside, HALF)
        if TURNED:
            turned_a, turned_b = _turn(
                a.to(tl.float32), b.to(tl.float32), cos_sin_ptr, start + j, column, inside, HALF, -1.0
            )
            a, b = turned_a.to(dtype), turned_b.to(dtype)
        weight = tl.load(w0_ptr + into + j * 2 * HALF, mask=fits, other=0.0)
        hidden = tl.dot(a, weight, hidden)
        weight = tl.load(w0_ptr + into + (j * 2 + 1) * HALF, mask=fits, other=0.0)
        hidden = tl.dot(b, weight, hidden)

    hidden += tl.load(b0_ptr + unit, mask=real, other=0.0).to(tl.float32)[None, :]
    square = unit[None, :] * WIDTH + unit[:, None]
    weight = tl.load(w3_ptr + square, mask=real[None, :] & real[:, None], other=0.0)
    hidden = tl.dot(tl.maximum(hidden, 0.0).to(dtype), weight)
    hidden += tl.load(b3_ptr + unit, mask=real, other=0.0).to(tl.float32)[None, :]
    active = tl.maximum(hidden, 0.0).to(dtype)
    # Rows of W6 as columns: (width, half).
    out_of = column[None, :] * WIDTH + unit[:, None]
    fits = real[:, None] & (column < HALF)[None, :]
    a = tl.dot(active, tl.load(w6_ptr + out_of, mask=fits, other=0.0))
    b = tl.dot(active, tl.load(w6_ptr + out_of + HALF * WIDTH, mask=fits, other=0.0))
    a += tl.load(b6_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    b += tl.load(b6_ptr + column + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    if TURNED:
        a, b = _turn(a, b, cos_sin_ptr, start + FACTOR - 1, column, inside, HALF, 1.0)
    if MEAN:
        # Turned back by its own position and on to the last one's, entry j turns by as much in every group. The entries
        # are read again, out of the cache: no tile of a product is used for anything else.
        mean_first = tl.zeros((SLOTS, BLOCK_HALF), tl.float32)
        mean_second = tl.zeros((SLOTS, BLOCK_HALF), tl.float32)
        for j in range(FACTOR):
            own_a, own_b = _halves(x_ptr, start + j, x_entry, column, inside, HALF)
            own_a, own_b = own_a.to(tl.float32), own_b.to(tl.float32)
            if TURNED:
                angle = (FACTOR - 1 - j) * 2 * HALF + column
                cos = tl.load(cos_sin_ptr + angle, mask=column < HALF, other=1.0).to(tl.float32)[None, :]
                sin = tl.load(cos_sin_ptr + angle + HALF, mask=column < HALF, other=0.0).to(tl.float32)[
                    None, :
                ]
                own_a, own_b = own_a * cos - own_b * sin, own_b * cos + own_a * sin
            mean_first += own_a
            mean_second += own_b
        a += mean_first / FACTOR
        b += mean_second / FACTOR

    page = tl.load(fresh_ptr + batch * table_width + slot // page_size, mask=mine, other=0).to(tl.int64)
    entry = ((page * heads + head) * page_size + slot % page_size) * 2 * HALF
    target = entry[:, None] + column[None, :]
    _put(pages_ptr, target, a, inside, LARGEST)
    _put(pages_ptr, target + HALF, b, inside, LARGEST)


@triton.jit(do_not_specialize=["slots", "table_width"])
def _copy_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    first_ptr,
    kinds_ptr,
    fresh_ptr,
    k_batch,
    k_head,
    k_entry,
    v_batch,
    v_head,
    v_entry,
    heads,
    slots,
    table_width,
    page_size,
    LARGEST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Entries that no group took."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    mine = tl.load(kinds_ptr + batch * slots + slot, mask=slot < slots, other=-1) == 0
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    source = tl.load(first_ptr + batch * slots + slot, mask=mine, other=0)
    page = tl.load(fresh_ptr + batch * table_width + slot // page_size, mask=mine, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = mine[:, None] & (column < DIM)[None, :]
    k = tl.load(k_ptr + (batch * k_batch + head * k_head + source * k_entry)[:, None] + column, mask=inside)
    v = tl.load(v_ptr + (batch * v_batch + head * v_head + source * v_entry)[:, None] + column, mask=inside)
    target = (((page * heads + head) * page_size + slot % page_size) * DIM)[:, None] + column[None, :]
    _put(keys_ptr, target, k.to(tl.float32), inside, LARGEST)
    _put(values_ptr, target, v.to(tl.float32), inside, LARGEST)


def takes(dtype: torch.dtype, head_dim: int, nets: Mapping[str, Net]) -> bool:
    """Whether the kernels are made for these networks. In float32, products without tensor cores are torch's."""
    widths = [net[1].shape[0] for net in nets.values()]
    half = head_dim // 2
    return dtype.itemsize == 2 and half >= 16 and head_dim <= MAX_HEAD and max(widths) <= MAX_WIDTH


def merge_into_pages(
    keys: Tensor,
    values: Tensor,
    plan: MergePlan,
    nets: Mapping[str, Net],
    layout: MergeLayout,
    cos_sin: Tensor,
    pages: tuple[Tensor, Tensor],
    fresh: Tensor,
) -> None:
    """keys to cos_sin: as for `merge_layer`; angles may be float16, which is half of what a program reads.

    pages: one layer's keys and values (P, Hk, page_size, d). fresh: (B, pages) int32, those of each sequence. Sums are
    float32 where the reference rounds each layer to the cache's dtype.
    """
    fresh = fresh.contiguous()
    batch, heads, _, dim = keys.shape
    slots, half = plan.first.shape[1], dim // 2
    assert keys.stride(3) == values.stride(3) == 1
    sizes = (heads, slots, fresh.shape[1], pages[0].shape[2])
    largest = torch.finfo(pages[0].dtype).max if pages[0].dtype.itemsize == 1 else 0.0
    strides = (*keys.stride()[:3], *values.stride()[:3])
    where = (plan.first, plan.kinds, fresh)
    grid = (batch * heads, triton.cdiv(slots, SLOTS))
    _copy_kernel[grid](
        keys, values, *pages, *where, *strides, *sizes,
        LARGEST=largest, DIM=dim, BLOCK=triton.next_power_of_2(dim), SLOTS=SLOTS, num_warps=4,
    )  # fmt: skip
    for kind in plan.rows:
        for part, x, target in (("k", keys, pages[0]), ("v", values, pages[1])):
            net = nets[kind + part]
            width = net[1].shape[0]
            turned = layout.unrotated and part == "k"
            _merge_kernel[grid](
                x, target, *where, cos_sin, *net, *x.stride()[:3], *sizes,
                KIND=1 + KINDS.index(kind), FACTOR=layout.factor, TURNED=turned,
                MEAN=layout.base == "mean", LARGEST=largest, HALF=half, WIDTH=width,
                BLOCK_HALF=max(16, triton.next_power_of_2(half)),
                BLOCK_WIDTH=max(16, triton.next_power_of_2(width)), SLOTS=SLOTS,
                num_warps=4 if width <= 128 else 8, num_stages=2,
            )  # fmt: skip
