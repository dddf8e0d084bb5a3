"""The element-wise operations as Triton kernels: each reads its inputs once and writes its outputs once.

Same names, shapes and roundings as the reference in ops.py; rotation is done in float32 and rounded once. The
kernel that rotates keys can store them, and the values beside them, in their pages: it has them in registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastcache.kvcache.pool import KVPlace
from fastcache.models.argmax_triton import argmax
from fastcache.models.ops import Ops
from fastcache.models.product_triton import product, takes

HEADS_PER_PROGRAM = 8
SILU_BLOCK = 2048


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    """One row: out = weight * normalise(x)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(x.dtype)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * size + columns, normed * weight, mask=inside)


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=inside, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out_ptr + row * size + columns, silu * up, mask=inside)


@triton.jit
def _store(ptr, first, second, mask, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """Both halves of heads as the pool holds them; LARGEST: the largest value of an 8-bit pool, else 0."""
    if LARGEST > 0:
        first = tl.clamp(first.to(tl.float32), -LARGEST, LARGEST)
        second = tl.clamp(second.to(tl.float32), -LARGEST, LARGEST)
    tl.store(ptr, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    num_heads,
    kv_heads,
    row_size,
    page_size,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    STORE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """A few heads of one token, in place: normalise each q and k head, rotate its halves; store k and v heads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    rotated_heads = num_heads + kv_heads
    inside = (head < rotated_heads) & (pair < HALF)
    if STORE:
        inside = (head < rotated_heads + kv_heads) & (pair < HALF)
    first_ptr = qkv_ptr + row * row_size + head * (2 * HALF) + pair
    first = tl.load(first_ptr, mask=inside, other=0.0)
    second = tl.load(first_ptr + HALF, mask=inside, other=0.0)
    raw_first, raw_second = first, second
    if NORM:
        a, b = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        is_query = head < num_heads
        weight_a = tl.where(is_query, tl.load(q_weight_ptr + pair), tl.load(k_weight_ptr + pair))
        weight_b = tl.where(
            is_query, tl.load(q_weight_ptr + HALF + pair), tl.load(k_weight_ptr + HALF + pair)
        )
        first = (a * scale).to(first.dtype) * weight_a
        second = (b * scale).to(second.dtype) * weight_b
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + row) * (2 * HALF) + pair
    cos = tl.load(angle_ptr).to(first.dtype).to(tl.float32)
    sin = tl.load(angle_ptr + HALF).to(first.dtype).to(tl.float32)
    a, b = first.to(tl.float32), second.to(tl.float32)
    turned_first, turned_second = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    turned = inside & (head < rotated_heads)
    tl.store(first_ptr, turned_first, mask=turned)
    tl.store(first_ptr + HALF, turned_second, mask=turned)
    if STORE:
        slot = tl.load(slots_ptr + row)
        is_value = head >= rotated_heads
        kv_head = head - tl.where(is_value, rotated_heads, num_heads)
        where = ((slot // page_size * kv_heads + kv_head) * page_size + slot % page_size) * (2 * HALF) + pair
        stored = inside & (kv_head >= 0) & (slot >= 0)
        _store(keys_ptr + where, turned_first, turned_second, stored & (head < rotated_heads), HALF, LARGEST)
        _store(values_ptr + where, raw_first, raw_second, stored & is_value, HALF, LARGEST)


class TritonOps(Ops):
    """CUDA, any dtype. Inputs are contiguous, head sizes a power of two times two."""

    name = "triton"
    stores_kv = True

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        size = x.shape[-1]
        block = triton.next_power_of_2(size)
        grid = (x.numel() // size,)
        _norm_kernel[grid](x, weight, out, size, eps, BLOCK=block, num_warps=max(1, block // 1024))
        return out

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not takes(x, weight):
            return F.linear(x, weight, bias)
        out = product(x, weight)
        return out if bias is None else out.add_(bias)

    def project_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """The product's kernel adds what is there already, so the sum costs no pass over memory, and rounds once."""
        total = residual.addmm_(x, weight.t())
        return total if bias is None else total.add_(bias)

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
        _silu_mul_kernel[(rows, triton.cdiv(size, SILU_BLOCK))](
            gate_up, out, size, BLOCK=SILU_BLOCK, num_warps=4
        )
        return out

    def qk_norm_rope(
        self,
        qkv: Tensor,
        heads: tuple[int, int, int],
        norms: tuple[Tensor, Tensor, float] | None,
        cos_sin: Tensor,
        positions: Tensor,
        place: KVPlace | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, kv_heads, dim = heads
        rotated = num_heads + kv_heads
        touched = rotated if place is None else rotated + kv_heads
        keys, values, slots = (qkv,) * 3 if place is None else (place.keys, place.values, place.slots)
        q_weight, k_weight, eps = norms if norms is not None else (qkv, qkv, 0.0)
        _norm_rope_kernel[(qkv.shape[0], triton.cdiv(touched, HEADS_PER_PROGRAM))](
            qkv,
            q_weight,
            k_weight,
            cos_sin,
            positions,
            keys,
            values,
            slots,
            num_heads,
            kv_heads,
            qkv.shape[1],
            1 if place is None else keys.shape[2],
            eps,
            NORM=norms is not None,
            HALF=dim // 2,
            HEADS=HEADS_PER_PROGRAM,
            STORE=place is not None,
            LARGEST=torch.finfo(keys.dtype).max if keys.dtype.itemsize == 1 else 0.0,
            num_warps=2,
        )
        parts = qkv.view(-1, rotated + kv_heads, dim).split([num_heads, kv_heads, kv_heads], dim=1)
        return parts[0], parts[1], parts[2]
