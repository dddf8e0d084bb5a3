"""KVzip: what the model needs of a context to say it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, whole_number


@dataclass(frozen=True, kw_only=True)
class KVzip(EvictionMethod):
    """Let the model repeat the context over its own cache, and keep the entries that the repetition attends to.

    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", NeurIPS 2025,
    arXiv:2505.23416. The engine replays each compressed context once, so a prefill takes two to three times as long:
    worth it where one context answers many questions, and as the measure of what cheaper scores reach.

    The paper spends one budget over all layers and heads, as `global_keep` does. As an engine's method every KV head
    keeps the same number, or what `head_budgets` says, which is calibrated with `global_keep`.

    n_sink: first entries that always stay, and that a later chunk's softmax includes.
    chunk_size: context tokens repeated at once.
    """

    name: ClassVar[str] = "kvzip"
    needs: ClassVar[frozenset[str]] = frozenset({"replay_scores"})

    n_sink: int = 4
    chunk_size: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("chunk_size", self.chunk_size, minimum=1)

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: the largest attention weight that a repeating query gave the entry."""
        return kv.replay_scores


def global_keep(scores: Tensor, compression_ratio: float, n_sink: int) -> Tensor:
    """(layers, kv_heads, N) bool: all but the lowest int(r x entries) of all scores; sinks stay."""
    protected = scores.clone()
    protected[..., :n_sink] = scores.max() + 1
    entries = protected.flatten()
    lowest = entries.argsort(stable=True)[: int(len(entries) * compression_ratio)]
    return entries.new_ones(len(entries), dtype=bool).scatter(0, lowest, False).view(scores.shape)
