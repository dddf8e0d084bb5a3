"""A frozen model run over whole windows, so that gradients can pass through it to a compressed cache.

Plain torch over our own modules: same weights, same arithmetic as the engine, no pages. All windows of a batch
have one length. Sizes: B windows of N context and C continuation tokens, H query and Hk KV heads of size d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.models.layers import Attend
from fastcache.models.llama import Llama

Cache = tuple[Tensor, Tensor]  # keys and values of one layer, (B, Hk, K, d); keys rotated


@dataclass(frozen=True)
class Teacher:
    """What the model does with the full cache."""

    caches: list[Cache]  # per layer, of the N context tokens
    queries: list[Tensor]  # per layer, rotated, of the last context tokens: (B, H, w, d)
    hidden: list[Tensor]  # per layer, after it, of the continuation: (B * C, hidden)
    logits: Tensor  # (B * C, vocab), model dtype


class FrozenModel:
    """`model` must have the plain torch operations: fast ones write in place and have no gradient."""

    def __init__(self, model: Llama) -> None:
        assert model.ops.name == "torch", "gradients need the plain operations"
        self.model = model

    def _run(
        self, ids: Tensor, first: int, attend: Attend, pictures: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """ids: (B, L) from position `first` on. Hidden states after each layer and the final ones, (B * L, n).
        pictures: embeddings for the places of the image token, in order."""
        model, hidden = self.model, []
        positions = torch.arange(first, first + ids.shape[1], device=ids.device).repeat(len(ids))
        x = model.embed[ids.flatten()]
        if pictures is not None:
            x[ids.flatten() == model.config.vision.image_token_id] = pictures.flatten(0, -2)
        for layer in model.layers:
            x = layer(x, positions, model.cos_sin, attend, None)
            hidden.append(x)
        return hidden, model.ops.rms_norm(x, model.norm.weight, model.config.rms_norm_eps)

    @torch.no_grad()
    def teacher(self, ids: Tensor, context: int, window: int = 0, pictures: Tensor | None = None) -> Teacher:
        """ids: (B, N + C); `context` is N, `window` how many of its last queries to keep. pictures: see `_run`."""
        batch, length = ids.shape
        caches: list[Cache] = []
        queries: list[Tensor] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (_heads(t, batch) for t in (q, k, v))
            caches.append((k[:, :, :context], v[:, :, :context]))
            if window:
                queries.append(q[:, :, context - window : context].clone())
            group = q.shape[1] // k.shape[1]
            out = F.scaled_dot_product_attention(q, _spread(k, group), _spread(v, group), is_causal=True)
            return out.transpose(1, 2).flatten(0, 1)

        hidden, final = self._run(ids, 0, attend, pictures)

        def tail(x: Tensor) -> Tensor:
            return x.view(batch, length, -1)[:, context:].flatten(0, 1)

        return Teacher(caches, queries, [tail(h) for h in hidden], self.model.logits(tail(final)))

    def student(self, ids: Tensor, first: int, caches: Sequence[Cache]) -> tuple[list[Tensor], Tensor]:
        """The continuation ids (B, C), from position `first` on, over `caches` of any length. Differentiable.

        Returns hidden states as in `Teacher` and logits (B * C, vocab).
        """
        batch, length = ids.shape
        stored = caches[0][0].shape[2]
        mask = torch.ones(length, stored + length, dtype=torch.bool, device=ids.device).tril(stored)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (_heads(t, batch) for t in (q, k, v))
            keys, values = torch.cat((caches[layer][0], k), 2), torch.cat((caches[layer][1], v), 2)
            group = q.shape[1] // k.shape[1]
            out = F.scaled_dot_product_attention(
                q, _spread(keys, group), _spread(values, group), attn_mask=mask
            )
            return out.transpose(1, 2).flatten(0, 1)

        hidden, final = self._run(ids, first, attend)
        return hidden, self.model.logits(final)


def _heads(x: Tensor, batch: int) -> Tensor:
    """(B * L, heads, d) -> (B, heads, L, d)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _spread(x: Tensor, group: int) -> Tensor:
    """KV heads repeated for the query heads that read them."""
    return x.repeat_interleave(group, dim=1)
