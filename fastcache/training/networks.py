"""The merging networks while they are trained: parameters in normalised units, folded into plain weights.

Keys and values have directions of very different size, which makes raw inputs hard to learn from. So a network
sees (x - mean) / spread and writes in units of the spread; both are constants, measured once per layer, and `fold`
puts them into the first and last linear layer. What is saved and run is the plain network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.compression.merge import MergeLayout, Net, rotate
from fastcache.compression.merge_checkpoint import LINEAR, tensor_name
from fastcache.training.frozen import Cache

KINDS = ("tk", "tv")


class MergeNetworks:
    """Networks of all layers. `parameters` go by the names of the checkpoint layout; float32.

    They start as their base: the last linear layer is zero.
    """

    def __init__(
        self,
        num_layers: int,
        head_dim: int,
        hidden: int,
        layout: MergeLayout,
        seed: int,
        device: torch.device,
    ) -> None:
        self.layout, self.num_layers = layout, num_layers
        shapes = {0: (hidden, layout.factor * head_dim), 3: (hidden, hidden), 6: (head_dim, hidden)}
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/networks").getrandbits(48))
        self.parameters: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        for kind in KINDS:
            for layer in range(num_layers):
                for linear, (rows, columns) in shapes.items():
                    scale = (
                        0.0 if linear == LINEAR[-1] else (2.0 / columns) ** 0.5
                    )  # He et al. 2015, for ReLU
                    weight = scale * torch.randn(rows, columns, generator=generator)
                    self.parameters[tensor_name(kind, layer, linear, "weight")] = weight.to(device)
                    self.parameters[tensor_name(kind, layer, linear, "bias")] = torch.zeros(
                        rows, device=device
                    )
                for part, value in (("mean", torch.zeros), ("spread", torch.ones)):
                    self.constants[f"{kind}.{layer}.{part}"] = value(head_dim, device=device)
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    @torch.no_grad()
    def normalise(self, caches: Sequence[Cache], cos_sin: Tensor) -> None:
        """Measure mean and spread of each layer's entries, in the units the networks see."""
        for layer, (keys, values) in enumerate(caches):
            keys = keys.float()
            if self.layout.unrotated:
                keys = rotate(keys, cos_sin[: keys.shape[2]], -1.0)
            for kind, entries in zip(KINDS, (keys, values.float()), strict=True):
                flat = entries[:, :, self.layout.n_sink :].flatten(0, 2)
                self.constants[f"{kind}.{layer}.mean"] = flat.mean(0)
                self.constants[f"{kind}.{layer}.spread"] = flat.std(0).clamp(min=1e-6)

    def fold(self, layer: int) -> dict[str, Net]:
        """The plain networks of a layer, differentiable in the parameters."""
        return {kind: self._fold(kind, layer) for kind in KINDS}

    def _fold(self, kind: str, layer: int) -> Net:
        mean, spread = (self.constants[f"{kind}.{layer}.{part}"] for part in ("mean", "spread"))
        w0, b0, w3, b3, w6, b6 = (
            self.parameters[tensor_name(kind, layer, linear, part)]
            for linear in LINEAR
            for part in ("weight", "bias")
        )
        w0 = w0 / spread.repeat(self.layout.factor)
        b0 = b0 - w0 @ mean.repeat(self.layout.factor)
        return w0, b0, w3, b3, w6 * spread[:, None], b6 * spread

    @torch.no_grad()
    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Plain weights by checkpoint name, on the CPU."""
        out = {}
        for kind in KINDS:
            for layer in range(self.num_layers):
                names = [
                    tensor_name(kind, layer, linear, part) for linear in LINEAR for part in ("weight", "bias")
                ]
                for name, tensor in zip(names, self._fold(kind, layer), strict=True):
                    out[name] = tensor.to(dtype).cpu()
        return out
