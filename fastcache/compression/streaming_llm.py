"""StreamingLLM: the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionMethod):
    """Keep `n_sink` first entries (attention sinks) and fill the budget with the most recent ones.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv:2309.17453.
    As in kvpress the kept entries stay at their rotary positions; the paper re-rotates them.
    """

    name: ClassVar[str] = "streaming_llm"
    needs: ClassVar[frozenset[str]] = frozenset()

    n_sink: int = 4

    def importance(self, kv: LayerKV) -> Tensor:
        """(1, 1, T): the position, exact in float32 up to 2^24 tokens."""
        return kv.positions.float()[None, None]
