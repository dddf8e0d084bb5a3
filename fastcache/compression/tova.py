"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV
from fastcache.compression.window import window_attention


@dataclass(frozen=True, kw_only=True)
class TOVA(EvictionMethod):
    """Keep the entries that the last query attends to, on average over all query heads of the layer.

    Oren et al., "Transformers are Multi-State RNNs", EMNLP 2024, arXiv:2401.06104. All KV heads of a layer keep
    the same tokens. The paper lets the last token compete like any other; as in kvpress it stays.
    """

    name: ClassVar[str] = "tova"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "window_queries"})
    window: ClassVar[int] = 1

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, 1, T) float32: attention of the last query, averaged over H."""
        return window_attention(kv).mean(1, dtype=torch.float32)
