"""LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744): Llama behind a CLIP tower and a two-layer projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcache.models.config import ModelConfig
from fastcache.models.layers import Linear
from fastcache.models.llama import Llama
from fastcache.models.ops import Ops
from fastcache.models.vision import VisionTower

# Pictures that pass the tower at once at most: enough to fill the matrix units, and a bound on the activations.
MAX_PICTURES = 32


class Projector(nn.Module):
    """From the tower's features to the language model's embeddings."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs, bias)
        self.linear_2 = Linear(outputs, outputs, bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class Llava(Llama):
    """Llama, which takes the embeddings of pictures in place of their placeholders' (see `Llama.forward`)."""

    def __init__(self, config: ModelConfig, ops: Ops, max_positions: int, device: torch.device) -> None:
        super().__init__(config, ops, max_positions, device)
        vision = config.vision
        assert vision is not None, "a LLaVA config has a vision part"
        self.vision = VisionTower(vision)
        features = vision.hidden_size * len(vision.feature_layers)
        self.projector = Projector(features, config.hidden_size, vision.projector_bias)

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """(N, channels, size, size), normalised -> (N, tokens_per_image, hidden_size), in the model's dtype."""
        parts = pixels.to(self.embed.dtype).split(MAX_PICTURES)
        return torch.cat([self.projector(self.vision(part)) for part in parts])
