"""Small prefill and mixed steps with CUDA graphs of everything between two attentions.

A step of a few hundred tokens keeps the device busy for less time than the host needs to launch its kernels one by one.
Attention differs from step to step and stays outside; what lies between two attentions depends on the number of tokens
alone, and is one launch (piecewise graphs, as vLLM and SGLang have them).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from fastcache.core import ForwardBatch
from fastcache.device.streams import CaptureStream, capture
from fastcache.models.config import ModelConfig
from fastcache.models.layers import Attend, Places
from fastcache.models.llama import Llama

# What a step is padded to: tiles of a matrix product, twice as many rows where padding is a smaller share. Longer steps
# keep the device busy for longer than their launches take; the last size is 1024 tokens of prompts and 128 that decode.
SIZES = (*range(64, 513, 64), *range(640, 1153, 128))
MOST_TOKENS = SIZES[-1]

# Layer, q, k, v, and where the result goes, (T, H, d).
AttendInto = Callable[[int, Tensor, Tensor, Tensor, Tensor], object]


def padded_tokens(tokens: int) -> int:
    """How many tokens a step of `tokens`, at most `MOST_TOKENS`, is padded to."""
    return SIZES[bisect_left(SIZES, tokens)]


def buffer_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the buffers of a `SmallSteps` take."""
    heads = 2 * (config.num_heads + config.num_kv_heads)  # q, k, v and what is attended
    return MOST_TOKENS * heads * config.head_dim * dtype.itemsize


def as_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """(T, H + 2 Hk, d) without a copy where each token's k follows its q, and v its k, as after a merged projection
    that was rotated in place; else None."""
    storage, place = q.untyped_storage().data_ptr(), q.storage_offset()
    for part in (q, k, v):
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != place:
            return None
        if part.stride() != q.stride():
            return None
        place += part.shape[1] * part.stride(1)
    return q.as_strided((len(q), q.shape[1] + k.shape[1] + v.shape[1], q.shape[2]), q.stride())


class SmallSteps:
    """Runs a model over steps of at most `MOST_TOKENS` tokens in static buffers, padded to one of `SIZES`.

    `places`: from slots (T,) to where each layer stores its entries, which leaves out slots of -1: those of padding.
    All layers share a buffer of queries, keys and values: whoever reads a layer's later asks `run` for copies.
    `home`: the partition's main stream, whose SMs a graph keeps; None for the default stream.
    """

    def __init__(
        self,
        model: Llama,
        places: Callable[[Tensor], Places | None],
        home: torch.cuda.Stream | None = None,
    ) -> None:
        self._model, self._places, self._streams = model, places, CaptureStream(home)
        config, like = model.config, model.embed

        def buffer(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._inputs = buffer(3, MOST_TOKENS, dtype=torch.int64)
        self._qkv = buffer(MOST_TOKENS, sum(self._heads), config.head_dim)
        self._attended = buffer(MOST_TOKENS, config.num_heads, config.head_dim)
        self._graphs: dict[
            tuple[torch.cuda.Stream | None, int], tuple[list[torch.cuda.CUDAGraph], Tensor]
        ] = {}
        self._memory = torch.cuda.graph_pool_handle() if like.is_cuda else None

    def move(self, home: torch.cuda.Stream | None) -> None:
        """Steps run on another stream from here on."""
        self._streams.home = home

    def run(self, batch: ForwardBatch, attend: AttendInto, lasting: bool = False) -> Tensor:
        """Final hidden states (T, hidden_size), valid until the next call. `attend` stores nothing; what it is given
        is overwritten in the next layer, unless `lasting`."""
        tokens = len(batch.input_ids)
        size = padded_tokens(tokens)
        self.fill(batch, size)
        if (self._streams.home, size) not in self._graphs:
            self._capture_all()
        pieces, hidden = self._graphs[self._streams.home, size]
        qkv, attended = self._qkv[:tokens], self._attended[:tokens]
        parts = qkv.split(self._heads, dim=1)
        for layer, piece in enumerate(pieces[:-1]):
            piece.replay()
            attend(layer, *(qkv.clone().split(self._heads, dim=1) if lasting else parts), attended)
        pieces[-1].replay()
        return hidden[:tokens]

    def fill(self, batch: ForwardBatch, size: int) -> None:
        """The step's inputs; padding repeats what an earlier step left there, and is stored nowhere."""
        tokens = len(batch.input_ids)
        for row, values in zip(
            self._inputs, (batch.input_ids, batch.positions, batch.slot_mapping), strict=True
        ):
            row[:tokens].copy_(values)
        self._inputs[2, tokens:size].fill_(-1)

    def forward(self, size: int, attend: Attend) -> Tensor:
        """The model over the first `size` of the buffers, launched kernel by kernel."""
        ids, positions, slots = self._inputs[:, :size]
        return self._model(ids, positions, attend, places=self._places(slots))

    def _capture_all(self) -> None:
        """All sizes at once, so that no later step waits for a capture; the largest first, whose memory the others
        use again."""
        for size in reversed(SIZES):
            self._graphs[self._streams.home, size] = self._capture(size)

    def _capture(self, size: int) -> tuple[list[torch.cuda.CUDAGraph], Tensor]:
        """Run once without graphs, so that kernels are compiled, then capture: each attention ends a piece and begins
        the next. Nothing is stored meanwhile."""
        slots = self._inputs[2].clone()
        self._inputs[2].fill_(-1)
        self.forward(size, lambda layer, q, k, v: self._attended[:size])
        stream = torch.cuda.current_stream()
        side = self._streams.beside(stream)
        side.wait_stream(stream)
        pieces = [torch.cuda.CUDAGraph()]
        with ExitStack() as piece:
            piece.enter_context(capture(pieces[0], side, (side,), self._memory))

            def cut(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                self._keep(q, k, v)
                piece.close()
                pieces.append(torch.cuda.CUDAGraph())
                piece.enter_context(capture(pieces[-1], side, (side,), self._memory))
                return self._attended[:size]

            hidden = self.forward(size, cut)
        stream.wait_stream(side)
        self._inputs[2].copy_(slots)
        return pieces, hidden

    def _keep(self, *computed: Tensor) -> None:
        """A layer's q, k, v in the buffer, by one copy where that is possible."""
        kept, whole = self._qkv[: len(computed[0])], as_one(*computed)
        if whole is not None:
            kept.copy_(whole)
            return
        for part, tensor in zip(kept.split(self._heads, dim=1), computed, strict=True):
            part.copy_(tensor)
