"""From a step's chunks to the tensors of one forward pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcache.core import Chunk, ForwardBatch, Step
from fastcache.kvcache.slots import slots_of


class BatchBuilder:
    """Keeps one row of page numbers per seat, so that a step copies only what changed since the last one."""

    def __init__(self, max_num_seqs: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self.page_size, self.device = page_size, device
        self._tables = np.zeros((max_num_seqs, max_pages), np.int32)
        self._synced: list[tuple[object, int, int]] = [(None, 0, 0)] * max_num_seqs

    def _sync(self, chunk: Chunk) -> None:
        """Bring the seat's row up to date: append new pages, or rewrite after a change of owner or a swap."""
        seq = chunk.seq
        owner, version, count = self._synced[seq.seat]
        if owner is not seq or version != seq.pages_version:
            count = 0
        if count < len(seq.pages):
            self._tables[seq.seat, count : len(seq.pages)] = seq.pages[count:]
        self._synced[seq.seat] = (seq, seq.pages_version, len(seq.pages))

    def build(self, step: Step, last_tokens: Tensor) -> ForwardBatch:
        """last_tokens: (max_num_seqs,) int64, the newest sampled token of each seat, on the device."""
        chunks = step.chunks
        for chunk in chunks:
            self._sync(chunk)
        seats = np.fromiter((c.seq.seat for c in chunks), np.int64, len(chunks))
        starts = np.fromiter((c.start for c in chunks), np.int64, len(chunks))
        kv_starts = np.fromiter((c.kv_start for c in chunks), np.int64, len(chunks))
        lengths = np.fromiter((c.length for c in chunks), np.int64, len(chunks))
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
        rows = np.repeat(np.arange(len(chunks)), lengths)
        within = np.arange(cu_seqlens[-1]) - cu_seqlens[:-1][rows]
        kv_lens = kv_starts + lengths
        table = self._tables[seats, : -(-int(kv_lens.max()) // self.page_size)]
        sampling = np.fromiter((c.sample for c in chunks), bool, len(chunks))
        to = self._to_device
        return ForwardBatch(
            decode=step.decode,
            input_ids=last_tokens[to(seats)] if step.decode else to(_known_ids(chunks)),
            positions=to(starts[rows] + within),
            slot_mapping=to(slots_of(table, rows, kv_starts[rows] + within, self.page_size)),
            cu_seqlens_q=to(cu_seqlens.astype(np.int32)),
            kv_lens=to(kv_lens.astype(np.int32)),
            page_table=to(table),
            sample_rows=to(cu_seqlens[1:][sampling] - 1),
            cu_seqlens_q_host=cu_seqlens,
            kv_lens_host=kv_lens,
            page_table_host=table,
        )

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _known_ids(chunks: tuple[Chunk, ...]) -> np.ndarray:
    """Token ids of prefill chunks, all of which the host knows."""
    parts = [np.asarray(c.seq.known_tokens[c.start : c.start + c.length], np.int64) for c in chunks]
    return np.concatenate(parts)
