"""From a step's chunks to the inputs of one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastcache.core import Chunk, ForwardBatch, HostBatch, Sequence, Step
from fastcache.kvcache.head_layout import Layout
from fastcache.kvcache.pages import SCRATCH_PAGE
from fastcache.kvcache.slots import slots_of


class BatchBuilder:
    """Keeps one row of page numbers per seat, so that a step copies only what changed since the last one."""

    def __init__(
        self,
        max_num_seqs: int,
        max_pages: int,
        page_size: int,
        layout_of: Callable[[Sequence], Layout | None] | None = None,
    ) -> None:
        self.page_size, self._layout_of = page_size, layout_of
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

    def build(self, step: Step) -> HostBatch:
        chunks = step.chunks
        for chunk in chunks:
            self._sync(chunk)
        numbers = np.asarray([(c.seq.seat, c.start, c.kv_start, c.length) for c in chunks], np.int64)
        seats, starts, kv_starts, lengths = numbers.T
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
        rows = np.repeat(np.arange(len(chunks)), lengths)
        within = np.arange(cu_seqlens[-1]) - cu_seqlens[:-1][rows]
        kv_lens = kv_starts + lengths
        width = max(-(-int(kv_lens.max()) // self.page_size), *(len(c.seq.pages) for c in chunks))
        table = self._tables[seats, :width]
        stored = np.fromiter((c.stored for c in chunks), bool, len(chunks))
        table[~stored] = SCRATCH_PAGE
        slots = slots_of(table, rows, kv_starts[rows] + within, self.page_size)
        sampling = np.fromiter((c.sample for c in chunks), bool, len(chunks))
        return HostBatch(
            decode=step.decode,
            token_ids=None if step.decode else _known_ids(chunks[: len(chunks) - step.decode_rows]),
            seats=seats,
            positions=starts[rows] + within,
            slots=np.where(stored[rows], slots, -1),
            cu_seqlens_q=cu_seqlens,
            kv_lens=kv_lens,
            page_table=table,
            sample_rows=cu_seqlens[1:][sampling] - 1,
            sample_seats=seats[sampling],
            decode_rows=step.decode_rows,
            layouts=tuple(self._layout_of(c.seq) for c in chunks) if self._layout_of is not None else (),
        )


def _known_ids(chunks: tuple[Chunk, ...]) -> np.ndarray:
    """Token ids of prefill chunks, all of which the host knows."""
    parts = [np.asarray(c.seq.known_tokens[c.start : c.start + c.length], np.int64) for c in chunks]
    return np.concatenate(parts)


def upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, in one copy that the host does not wait for. All of one dtype."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def to_device(host: HostBatch, last_tokens: Tensor) -> ForwardBatch:
    """last_tokens: (max_num_seqs,) int64, the newest sampled token of each seat, on the device."""
    device = last_tokens.device
    on_device = host.num_seqs if host.decode else host.decode_rows  # sequences whose token is on the device
    seats_of = host.seats[host.num_seqs - on_device :]
    known = [] if host.token_ids is None else host.token_ids
    ids = np.concatenate((known, seats_of)).astype(np.int64)
    numbers = [ids, host.positions, host.slots, host.cu_seqlens_q, host.kv_lens]
    ids, positions, slots, cu_seqlens, kv_lens, rows = upload([*numbers, host.sample_rows], device)
    if on_device:
        split = len(ids) - on_device
        ids = torch.cat((ids[:split], last_tokens[ids[split:]]))
    return ForwardBatch(
        host=host,
        input_ids=ids,
        positions=positions,
        slot_mapping=slots,
        cu_seqlens_q=cu_seqlens,
        kv_lens=kv_lens,
        page_table=upload([host.page_table], device)[0],
        sample_rows=rows,
    )
