"""The merging networks while they are trained: parameters in normalised units, folded into plain weights.

Keys and values have directions of very different size, which makes raw inputs hard to learn from. So a network
sees (x - mean) / spread and writes in units of the spread; both are constants, measured once per layer, and `fold`
puts them into the first and last linear layer. What is saved and run is the plain network.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcache.compression.merge import MergeLayout, Net, rotate
from fastcache.compression.merge_checkpoint import LINEAR, tensor_name
from fastcache.compression.transform import Spans
from fastcache.training.frozen import Cache

TEXT, IMAGES = ("tk", "tv"), ("ik", "iv")


class MergeNetworks:
    """Networks of all L layers, stacked, so that each operation does them all; float32.

    `parameters` are named like "tk.0.weight", (L, rows, columns) or (L, rows); `constants` like "tk.mean", (L, d). The
    networks start as their base: the last linear layer is zero.
    """

    def __init__(
        self,
        num_layers: int,
        head_dim: int,
        hidden: int,
        layout: MergeLayout,
        seed: int,
        device: torch.device,
        kinds: Sequence[str] = TEXT,
    ) -> None:
        self.layout, self.num_layers, self.kinds = layout, num_layers, tuple(kinds)
        shapes = {0: (hidden, layout.factor * head_dim), 3: (hidden, hidden), 6: (head_dim, hidden)}
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/networks").getrandbits(48))
        self.parameters: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        for kind in self.kinds:
            for linear, (rows, columns) in shapes.items():
                # He et al. 2015, for ReLU
                scale = 0.0 if linear == LINEAR[-1] else (2.0 / columns) ** 0.5
                weight = scale * torch.randn(num_layers, rows, columns, generator=generator)
                self.parameters[f"{kind}.{linear}.weight"] = weight.to(device)
                self.parameters[f"{kind}.{linear}.bias"] = torch.zeros(num_layers, rows, device=device)
            for part, value in (("mean", torch.zeros), ("spread", torch.ones)):
                self.constants[f"{kind}.{part}"] = value(num_layers, head_dim, device=device)
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    @torch.no_grad()
    def normalise(self, caches: Sequence[Cache], cos_sin: Tensor, spans: Spans = ()) -> None:
        """Measure mean and spread of each layer's entries, in the units the networks see. spans: of pictures."""
        runs = dataclasses.replace(self.layout, recent=0).segments(caches[0][0].shape[2], spans)
        places = {
            kind: [torch.arange(first, end) for first, end, image in runs if image == (kind in IMAGES)]
            for kind in self.kinds
        }
        for layer, (keys, values) in enumerate(caches):
            keys = keys.float()
            if self.layout.unrotated:
                keys = rotate(keys, cos_sin[: keys.shape[2]], -1.0)
            for kind in self.kinds:
                entries = keys if kind.endswith("k") else values.float()
                flat = entries[:, :, torch.cat(places[kind]).to(keys.device)].flatten(0, 2)
                self.constants[f"{kind}.mean"][layer] = flat.mean(0)
                self.constants[f"{kind}.spread"][layer] = flat.std(0).clamp(min=1e-6)

    def fold(self, rounded: torch.dtype = torch.float32) -> dict[str, Net]:
        """The plain networks by kind, stacked, differentiable in the parameters.

        rounded: what weights will be stored in. The first bias then makes up for what rounding does to the mean, which
        in keys is many times the spread.
        """
        return {kind: self._fold(kind, rounded) for kind in self.kinds}

    def _fold(self, kind: str, rounded: torch.dtype) -> Net:
        mean, spread = (self.constants[f"{kind}.{part}"] for part in ("mean", "spread"))
        w0, b0, w3, b3, w6, b6 = (
            self.parameters[f"{kind}.{linear}.{part}"] for linear in LINEAR for part in ("weight", "bias")
        )
        repeats = (1, self.layout.factor)
        w0 = (w0 / spread.repeat(repeats)[:, None]).to(rounded).float()
        b0 = b0 - (w0 * mean.repeat(repeats)[:, None]).sum(-1)
        return w0, b0, w3, b3, w6 * spread[:, :, None], b6 * spread

    @torch.no_grad()
    def export(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Plain networks by checkpoint name, on the CPU: weights in `dtype`, biases, which are few, in float32."""
        out = {}
        for kind, net in self.fold(dtype).items():
            names = [(linear, part) for linear in LINEAR for part in ("weight", "bias")]
            for (linear, part), stack in zip(names, net, strict=True):
                stack = stack.to(dtype if part == "weight" else torch.float32).cpu()
                for layer in range(self.num_layers):
                    out[tensor_name(kind, layer, linear, part)] = stack[layer].clone()
        return out
