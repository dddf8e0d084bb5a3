"""The CLIP vision tower (Radford et al. 2021, arXiv:2103.00020): a pre-norm transformer over picture patches.

Only the layers up to the last used feature exist. All pictures have one size, so attention needs no mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.models.layers import Linear
from fastcache.models.vision_config import VisionConfig


class LayerNorm(nn.Module):
    """Mean and variance over the last dimension, weight and bias. Filled by weights.py."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Patches(nn.Module):
    """Each patch of a picture to one vector. CLIP's convolution has its kernel as its stride, so it is one product,
    in the precision of every other product (a float32 convolution on CUDA would round to TF32)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        shape = (config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, channels, size, size) -> (N, patches, hidden), row by row; a rest that fills no patch is left out."""
        count, channels, size, patch = *pixels.shape[:3], self.weight.shape[-1]
        side = size // patch
        cut = pixels[..., : side * patch, : side * patch]
        cut = cut.reshape(count, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        return F.linear(cut.reshape(count, side * side, -1), self.weight.flatten(1))


class VisionLayer(nn.Module):
    """Full attention and a two-layer MLP, each behind its norm and added to its input."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.activation = config.num_heads, config.activation
        self.attention_norm = LayerNorm(size, config.layer_norm_eps)
        self.qkv = Linear(size, 3 * size, bias=True)
        self.output = Linear(size, size, bias=True)
        self.mlp_norm = LayerNorm(size, config.layer_norm_eps)
        self.up = Linear(size, config.intermediate_size, bias=True)
        self.down = Linear(config.intermediate_size, size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, hidden) -> the same."""
        batch, tokens, size = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, size)
        x = x + self.output(attended)
        return x + self.down(self._activate(self.up(self.mlp_norm(x))))

    def _activate(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if self.activation == "quick_gelu" else F.gelu(x)


class VisionTower(nn.Module):
    """Pictures in, the features that LLaVA uses of them out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.patches = Patches(config)
        positions = (config.num_patches + 1, config.hidden_size)
        self.positions = nn.Parameter(torch.empty(positions), requires_grad=False)
        self.input_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, channels, size, size), normalised -> (N, tokens_per_image, hidden * number of feature layers)."""
        patches = self.patches(pixels)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.input_norm(torch.cat((first, patches), dim=1) + self.positions)
        states = {0: x}
        for index, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if index in self.config.feature_layers:
                states[index] = x
        features = torch.cat([states[index] for index in self.config.feature_layers], dim=-1)
        return features if self.config.class_token else features[:, 1:]
