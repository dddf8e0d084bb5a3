"""What an attention backend is: `plan` once per step, `run` once per layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastcache.core import ForwardBatch, HostBatch
from fastcache.kvcache.pool import KVPlace, KVPool


@dataclass(frozen=True)
class HeadShape:
    """Query heads H, KV heads Hk (H is a multiple of Hk) and head size d."""

    num_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.kv_heads


class AttentionBackend(ABC):
    """Causal attention of packed queries over each sequence's stored entries.

    Query i of a sequence with q new tokens and kv_len stored entries (new ones included) attends the entries
    0 .. kv_len - q + i: stored order is what counts, positions only shape the rotation of keys.
    """

    name: str
    supports_graphs = False
    keep_lse = False
    """Whether somebody wants `lse`."""
    lse: Tensor | None = None
    """With `keep_lse`, of a backend that can: of the last `run`, each query's softmax denominator as a logarithm to
    base 2, (rows, H) float32; true for sequences that start in the step, and only up to the last row of these."""

    def __init__(self, pool: KVPool, heads: HeadShape) -> None:
        self.pool, self.heads = pool, heads
        self.scale = heads.head_dim**-0.5

    @abstractmethod
    def plan(self, batch: ForwardBatch) -> None:
        """Prepare for one step. Host work belongs here. A mixed step's last `decode_rows` sequences have one new
        token each; `split_mixed` gives both parts."""

    def plan_graph(self, host: HostBatch) -> None:
        """Prepare for a decode step that is captured or replayed as a graph. Only if `supports_graphs`."""
        raise NotImplementedError(f"{self.name} does not support CUDA graphs")

    def store(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Put the step's new entries where `run` will find them. k, v: (T, Hk, d); slot_mapping: (T,) int64."""
        self.pool.write(layer, k, v, slot_mapping)

    def place(self, layer: int, slot_mapping: Tensor) -> KVPlace | None:
        """Where `store` would put them, for a kernel that has them in hand anyway; None if only `store` can."""
        return self.pool.place(layer, slot_mapping)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """q: (T, H, d); k, v: (T, Hk, d), the step's new entries, stored already where they have a slot.
        out: contiguous (T, H, d) to write to; a new one without. Returns it."""
        if out is None:
            out = q.new_empty(q.shape)
        self._write(layer, q, k, v, out)
        return out

    @abstractmethod
    def _write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """`run` into all rows of `out`, which may hold anything before."""


def page_readers(host: HostBatch) -> int:
    """How many of a prefill's leading sequences read pages. Those behind them start in this step: their entries
    are all among the step's own keys and values, and their pages need not hold anything."""
    continued = np.flatnonzero(np.diff(host.cu_seqlens_q) < host.kv_lens)
    return int(continued[-1]) + 1 if len(continued) else 0


def split_mixed(host: HostBatch) -> tuple[HostBatch, HostBatch]:
    """A mixed step as its prefill and its decode: of B sequences the first, and the last `decode_rows`."""
    b = host.num_seqs - host.decode_rows
    t = int(host.cu_seqlens_q[b])

    def part(decode: bool, seqs: slice, rows: slice, cu_seqlens: np.ndarray) -> HostBatch:
        return dataclasses.replace(
            host,
            decode=decode,
            token_ids=None if decode else host.token_ids,
            seats=host.seats[seqs],
            positions=host.positions[rows],
            slots=host.slots[rows],
            cu_seqlens_q=cu_seqlens,
            kv_lens=host.kv_lens[seqs],
            page_table=host.page_table[seqs],
            decode_rows=0,
        )

    prefill = part(False, slice(0, b), slice(0, t), host.cu_seqlens_q[: b + 1])
    decode = part(True, slice(b, None), slice(t, None), host.cu_seqlens_q[b:] - t)
    return prefill, decode
