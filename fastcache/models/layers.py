"""The layers that decoder-only models share. Projections that read the same input are merged.

The way of the data in one layer, T packed tokens:
hidden (T, n) -> norm -> qkv -> q/k norm, rotation -> attend(layer, q, k, v) -> output projection, added to hidden
-> norm -> gate and up -> silu * -> down, added to hidden.
With `rows` only those go on behind attention: in the last layer, those that a token is sampled from.
`attend` returns (T, H, d); it is an argument, so a layer holds no state of a batch. `attend` stores k and v, unless
`places` says where: then the rotation does, which has them in registers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.kvcache.pool import KVPlace
from fastcache.models.config import ModelConfig
from fastcache.models.ops import Ops

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Places = Callable[[int], KVPlace]


class Linear(nn.Module):
    """y = x W^T (+ b), W (out, in). Parameters start uninitialised: weights.py fills every one of them."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def of(self, x: Tensor, ops: Ops) -> Tensor:
        """y by the fastest kernel for these shapes."""
        return ops.project(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor, ops: Ops) -> Tensor:
        """residual + y; may be in the residual's memory."""
        return ops.project_add(x, self.weight, self.bias, residual)


class Norm(nn.Module):
    """Holds a norm's weight; the arithmetic is `Ops`'s."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)


class Attention(nn.Module):
    """Multi-head attention with grouped KV heads; q and k are normalised per head where the model does so."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, qk_norm: bool) -> None:
        super().__init__()
        self.layer, self.ops, self.eps = layer, ops, config.rms_norm_eps
        self.heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.qkv = Linear(config.hidden_size, width + 2 * kv_width, config.attention_bias)
        # Llama's attention_bias covers the output projection too; Qwen3's likewise (transformers 4.51+).
        self.output = Linear(width, config.hidden_size, config.attention_bias)
        self.q_norm = Norm(config.head_dim) if qk_norm else None
        self.k_norm = Norm(config.head_dim) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        attend: Attend,
        places: Places | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """residual + attention of x, both (T, n); of `rows` alone where they are given."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight, self.eps)
        place = None if places is None else places(self.layer)
        q, k, v = self.ops.qk_norm_rope(self.qkv(x), self.heads, norms, cos_sin, positions, place)
        attended = attend(self.layer, q, k, v).flatten(1)
        if rows is not None:
            residual, attended = residual[rows], attended[rows]
        return self.output.add_to(residual, attended, self.ops)


class FeedForward(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), gate and up merged."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + MLP of x, both (T, n)."""
        return self.down.add_to(residual, self.ops.silu_mul(self.gate_up.of(x, self.ops)), self.ops)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the hidden state."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops, qk_norm: bool) -> None:
        super().__init__()
        self.ops, self.eps = ops, config.rms_norm_eps
        self.input_norm = Norm(config.hidden_size)
        self.attention = Attention(config, layer, ops, qk_norm)
        self.post_norm = Norm(config.hidden_size)
        self.feed_forward = FeedForward(config, ops)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        attend: Attend,
        places: Places | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """(T, n) -> (T, n), or (R, n) with rows (R,); may overwrite x."""
        normed = self.ops.rms_norm(x, self.input_norm.weight, self.eps)
        x = self.attention(normed, x, positions, cos_sin, attend, places, rows)
        return self.feed_forward(self.ops.rms_norm(x, self.post_norm.weight, self.eps), x)
