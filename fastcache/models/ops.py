"""The element-wise operations of a decoder layer: the plain torch reference, and who provides faster ones.

`Ops` is the seam: model files and the runner call these names, `select_ops` says who answers on a device.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.kvcache.pool import KVPlace


class Ops:
    """Reference implementations, any device. Fast versions subclass this with the same signatures."""

    name = "torch"
    stores_kv = False  # whether `qk_norm_rope` takes a `place`

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (..., n), weight: (n,). Statistics in float32, result in x's dtype (Zhang, Sennrich 2019)."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T (+ b): x (T, k), weight (n, k)."""
        return F.linear(x, weight, bias)

    def project_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """residual + x W^T (+ b): x (T, k), weight (n, k), residual (T, n). May reuse the residual's memory."""
        return residual + F.linear(x, weight, bias)

    def argmax(self, logits: Tensor) -> Tensor:
        """(S, V) -> (S,) int64: the likeliest token of each row, the first of equals."""
        return logits.argmax(dim=-1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """(T, 2n) -> (T, n): silu(first half) * second half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def qk_norm_rope(
        self,
        qkv: Tensor,
        heads: tuple[int, int, int],
        norms: tuple[Tensor, Tensor, float] | None,
        cos_sin: Tensor,
        positions: Tensor,
        place: KVPlace | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split a merged projection, normalise q and k per head when `norms` is given, rotate them.

        qkv: (T, (H + 2 Hk) d); heads: (H, Hk, d); norms: (q weight (d,), k weight (d,), eps);
        cos_sin: (max_positions, 2, d / 2) float32; positions: (T,) int64. place: where k and v are to be stored as
        well; None here, where `KVPool.write` does it.
        Returns q (T, H, d), k (T, Hk, d), v (T, Hk, d). Rotation as in GPT-NeoX (first half with second).
        """
        num_heads, kv_heads, dim = heads
        q, k, v = qkv.view(-1, num_heads + 2 * kv_heads, dim).split([num_heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            q_weight, k_weight, eps = norms
            q, k = self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps)
        cos, sin = cos_sin[positions].to(q.dtype).unsqueeze(1).unbind(2)  # each (T, 1, d / 2)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def select_ops(device: torch.device) -> Ops:
    """The fastest provider that this device and installation have."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from fastcache.models.ops_triton import TritonOps

        return TritonOps()
    return Ops()
