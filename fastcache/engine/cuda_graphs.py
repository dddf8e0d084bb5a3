"""Decode steps as CUDA graphs: one per padded batch size, captured when that size is first needed.

Host work per step is one small copy and the backend's `plan`; the launches of a whole forward pass become one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastcache.attention.base import AttentionBackend
from fastcache.core import HostBatch
from fastcache.device.streams import CaptureStream, capture
from fastcache.kvcache.pages import SCRATCH_PAGE

SMALL_SIZES = (1, 2, 4, 8)
SIZE_STEP = 16

Decode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def padded_size(num_seqs: int) -> int:
    """The batch size a step of `num_seqs` sequences is padded to."""
    small = next((size for size in SMALL_SIZES if size >= num_seqs), None)
    return small or -(-num_seqs // SIZE_STEP) * SIZE_STEP


def pad(host: HostBatch, size: int, spare_seat: int) -> HostBatch:
    """Rows up to `size` that store one token on the scratch page, attend it, and feed a seat nobody has."""
    extra = size - host.num_seqs
    if extra == 0:
        return host

    def fill(array: np.ndarray, value: int) -> np.ndarray:
        return np.concatenate((array, np.full((extra, *array.shape[1:]), value, array.dtype)))

    return HostBatch(
        decode=True,
        token_ids=None,
        seats=fill(host.seats, spare_seat),
        positions=fill(host.positions, 0),
        slots=fill(host.slots, 0),
        cu_seqlens_q=np.arange(size + 1),
        kv_lens=fill(host.kv_lens, 1),
        page_table=fill(host.page_table, SCRATCH_PAGE),
        sample_rows=np.arange(size),
        sample_seats=fill(host.sample_seats, spare_seat),
        layouts=host.layouts,
    )


class DecodeGraphs:
    """Captures and replays `decode(seats, positions, slots) -> (logits, likeliest tokens)` over static buffers.

    `decode` also puts each seat's token into `last_tokens`, from where the next step takes it. A graph keeps the SMs of
    the stream it is captured on, so each stream that decodes gets graphs of its own: `home` is where steps run now, a
    partition's main stream, or None for the default stream. Errors: `CaptureWithoutStream` for a step that runs
    elsewhere.
    """

    def __init__(
        self,
        decode: Decode,
        backend: AttentionBackend,
        last_tokens: Tensor,
        max_num_seqs: int,
        home: torch.cuda.Stream | None = None,
    ) -> None:
        self._decode, self._backend = decode, backend
        self._last_tokens, self._spare_seat = last_tokens, max_num_seqs
        self._inputs = torch.zeros(
            (3, padded_size(max_num_seqs)), dtype=torch.int64, device=last_tokens.device
        )
        self._graphs: dict[
            tuple[torch.cuda.Stream | None, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]
        ] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._streams = CaptureStream(home)

    def move(self, home: torch.cuda.Stream | None) -> None:
        """Steps run on another stream from here on."""
        self._streams.home = home

    def run(self, host: HostBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, vocab) and likeliest tokens (B,) of a decode step; valid until the next call."""
        size = padded_size(host.num_seqs)
        padded = pad(host, size, self._spare_seat)
        numbers = torch.from_numpy(np.stack((padded.seats, padded.positions, padded.slots))).pin_memory()
        self._inputs[:, :size].copy_(numbers, non_blocking=True)
        self._backend.plan_graph(padded)
        key = (self._streams.home, size)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size)
        graph, logits, tokens = self._graphs[key]
        graph.replay()
        return logits[: host.num_seqs], tokens[: host.num_seqs]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Run once eagerly, so that kernels are compiled, then capture. Storing the same KV twice is harmless; the
        tokens that the step starts from are put back."""
        seats, positions, slots = self._inputs[:, :size]
        stream = torch.cuda.current_stream()
        side = self._streams.beside(stream)
        before = self._last_tokens.clone()
        self._decode(seats, positions, slots)
        self._last_tokens.copy_(before)
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(stream)
        with capture(graph, side, (side,), self._memory):
            logits, tokens = self._decode(seats, positions, slots)
        stream.wait_stream(side)
        return graph, logits, tokens
