"""Small prefill and mixed steps with CUDA graphs of everything between two attentions.

A step of a few hundred tokens keeps the device busy for less time than the host needs to launch its kernels one by one.
Attention differs from step to step and stays outside; what lies between two attentions depends on the number of tokens
alone, and is one launch (piecewise graphs, as vLLM and SGLang have them).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from fastcache.core import ForwardBatch
from fastcache.device.streams import CaptureStream, capture
from fastcache.models.config import ModelConfig
from fastcache.models.layers import Attend, Places
from fastcache.models.llama import Llama

# Longer steps keep the device busy for longer than their launches take.
MOST_TOKENS = 512
# GEMMs work in tiles of as many rows.
SIZE_STEP = 64


def padded_tokens(tokens: int) -> int:
    """How many tokens a step of `tokens` is padded to."""
    return -(-tokens // SIZE_STEP) * SIZE_STEP


def buffer_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What the buffers of a `SmallSteps` take."""
    entries = config.num_layers * (config.num_heads + 2 * config.num_kv_heads) + config.num_heads
    return MOST_TOKENS * entries * config.head_dim * dtype.itemsize


class SmallSteps:
    """Runs a model over steps of at most `MOST_TOKENS` tokens in static buffers, padded to a multiple of `SIZE_STEP`.

    `places`: from slots (T,) to where each layer stores its entries, which leaves out slots of -1: those of padding.
    Queries, keys and values have a buffer for each layer, because compression may look at many layers at once.
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

        layers, heads = config.num_layers, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._inputs = buffer(3, MOST_TOKENS, dtype=torch.int64)
        self._qkv = tuple(buffer(layers, MOST_TOKENS, count, config.head_dim) for count in heads)
        self._attended = buffer(MOST_TOKENS, config.num_heads, config.head_dim)
        self._graphs: dict[
            tuple[torch.cuda.Stream | None, int], tuple[list[torch.cuda.CUDAGraph], Tensor]
        ] = {}
        self._memory = torch.cuda.graph_pool_handle() if like.is_cuda else None

    def move(self, home: torch.cuda.Stream | None) -> None:
        """Steps run on another stream from here on."""
        self._streams.home = home

    def run(self, batch: ForwardBatch, attend: Attend) -> Tensor:
        """Final hidden states (T, hidden_size), valid until the next call. `attend` stores nothing."""
        tokens = len(batch.input_ids)
        size = padded_tokens(tokens)
        self.fill(batch, size)
        if (self._streams.home, size) not in self._graphs:
            self._capture_all()
        pieces, hidden = self._graphs[self._streams.home, size]
        for layer, piece in enumerate(pieces[:-1]):
            piece.replay()
            q, k, v = (each[layer, :tokens] for each in self._qkv)
            self._attended[:tokens].copy_(attend(layer, q, k, v))
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
        for size in range(MOST_TOKENS, 0, -SIZE_STEP):
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

            def cut(layer: int, *computed: Tensor) -> Tensor:
                for buffer, tensor in zip(self._qkv, computed, strict=True):
                    buffer[layer, :size].copy_(tensor)
                piece.close()
                pieces.append(torch.cuda.CUDAGraph())
                piece.enter_context(capture(pieces[-1], side, (side,), self._memory))
                return self._attended[:size]

            hidden = self.forward(size, cut)
        stream.wait_stream(side)
        self._inputs[2].copy_(slots)
        return pieces, hidden
