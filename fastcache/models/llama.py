"""Llama (Touvron et al. 2023): pre-norm decoder, rotary positions, grouped KV heads, gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcache.models.config import ModelConfig
from fastcache.models.layers import Attend, DecoderLayer, Linear, Norm, Places
from fastcache.models.ops import Ops
from fastcache.models.rope import rotary_table


class Llama(nn.Module):
    """Token ids and positions in, final hidden states out; `logits` is apart, for the rows that need it."""

    qk_norm = False

    def __init__(self, config: ModelConfig, ops: Ops, max_positions: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size), requires_grad=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, ops, self.qk_norm) for layer in range(config.num_layers)
        )
        self.norm = Norm(config.hidden_size)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.cos_sin = rotary_table(config.rope, config.head_dim, max_positions, device)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        embeddings: Tensor | None = None,
        places: Places | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """input_ids, positions: (T,) int64. Returns (T, hidden_size).

        embeddings: (T, hidden_size) to start from in place of the tokens' own; they may be overwritten.
        rows: (R,) int64, those whose final state is wanted; then (R, hidden_size) is returned, and the last layer does
            nothing for the others once their keys and values are there.
        places: where each layer stores its new keys and values; only with `ops.stores_kv`, else `attend` does.
        """
        x = self.embed[input_ids] if embeddings is None else embeddings
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, self.cos_sin, attend, places, rows if number == last else None)
        return self.ops.rms_norm(x, self.norm.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, hidden_size) -> (S, vocab_size), in the model's dtype."""
        return hidden @ self.embed.t() if self.head is None else self.head(hidden)
