"""The element-wise operations as Triton kernels: each reads its inputs once and writes its outputs once.

Same names, shapes and roundings as the reference in ops.py; rotation is done in float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcache.models.ops import Ops

HEADS_PER_PROGRAM = 8
SILU_BLOCK = 2048


@triton.jit
def _norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row: out = weight * normalise(x [+ residual]); with ADD the sum goes back to residual."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0)
    if ADD:
        x = x + tl.load(residual_ptr + row * size + columns, mask=inside, other=0.0)
        tl.store(residual_ptr + row * size + columns, x, mask=inside)
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
def _norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    num_heads,
    rotated_heads,
    row_size,
    eps,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A few q and k heads of one token, in place: normalise each head, rotate its halves."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < rotated_heads) & (pair < HALF)
    first_ptr = qkv_ptr + row * row_size + head * (2 * HALF) + pair
    first = tl.load(first_ptr, mask=inside, other=0.0)
    second = tl.load(first_ptr + HALF, mask=inside, other=0.0)
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
    tl.store(first_ptr, (a * cos - b * sin).to(first.dtype), mask=inside)
    tl.store(first_ptr + HALF, (b * cos + a * sin).to(first.dtype), mask=inside)


class TritonOps(Ops):
    """CUDA, any dtype. Inputs are contiguous, head sizes a power of two times two."""

    name = "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        _launch_norm(x, x, weight, out, eps, add=False)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        _launch_norm(x, residual, weight, x, eps, add=True)
        return x, residual

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_heads, kv_heads, dim = heads
        rotated = num_heads + kv_heads
        q_weight, k_weight, eps = norms if norms is not None else (qkv, qkv, 0.0)
        _norm_rope_kernel[(qkv.shape[0], triton.cdiv(rotated, HEADS_PER_PROGRAM))](
            qkv,
            q_weight,
            k_weight,
            cos_sin,
            positions,
            num_heads,
            rotated,
            qkv.shape[1],
            eps,
            NORM=norms is not None,
            HALF=dim // 2,
            HEADS=HEADS_PER_PROGRAM,
            num_warps=2,
        )
        parts = qkv.view(-1, rotated + kv_heads, dim).split([num_heads, kv_heads, kv_heads], dim=1)
        return parts[0], parts[1], parts[2]


def _launch_norm(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    rows = x.numel() // size
    _norm_kernel[(rows,)](
        x, residual, weight, out, size, eps, ADD=add, BLOCK=block, num_warps=max(1, block // 1024)
    )
