"""A prefill step's tensors as a method's measurement needs them: the shape of a model, random content."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.base import EvictionMethod, budget
from fastcache.compression.layer import LayerCompressor
from fastcache.compression.layer_transform import LayerTransformer
from fastcache.compression.states import StateFit, StateMethod, StateRater
from fastcache.compression.transform import BoundTransform
from fastcache.compression.work import Computed, Packed, Rotation, Work
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.kvcache.slots import pages_for

# Plausible logarithm of a softmax denominator: nothing overflows, and no time depends on it.
LSE = 12.0
THETA = 1e6


@dataclass(frozen=True)
class StepShape:
    """`sequences` contexts of `context` tokens that one prefill step computes and compresses.

    heads, kv_heads, head_dim: of the model, of `num_layers` layers, in `dtype`. ratio: what is removed. paged: out of
    pages, as after a prefill in chunks or one that deferred it, and not out of the step's own keys and values.
    hidden_size: for methods of hidden states. dummy_weights: the model's are, so a method's may be.
    """

    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    context: int
    sequences: int
    ratio: float
    page_size: int = 16
    paged: bool = False
    hidden_size: int = 0
    dummy_weights: bool = False

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.context

    def kept(self, method: EvictionMethod | BoundTransform) -> int:
        """Entries per KV head that `method` leaves of each context."""
        if isinstance(method, BoundTransform):
            return method.kept(self.context)
        return budget(self.context, self.ratio)

    def rotation(self, device: torch.device) -> Rotation:
        half = self.head_dim // 2
        inv_freq = THETA ** -(torch.arange(half, device=device) / half)
        angles = torch.arange(self.context, device=device)[:, None] * inv_freq
        return Rotation(torch.stack((angles.cos(), angles.sin()), dim=1), inv_freq)

    def rater(self, method: EvictionMethod | BoundTransform, device: torch.device) -> StateRater | None:
        """Who rates hidden states for `method`, if anybody does."""
        if not isinstance(method, StateMethod):
            return None
        sizes = (self.num_layers, self.hidden_size, self.kv_heads)
        return method.rater(StateFit(*sizes, self.dtype, device, self.dummy_weights))


class StepInputs:
    """`layer(i)` compresses layer i of the step, as the engine does behind that layer's attention, and rates its hidden
    states before, for a method that needs it."""

    def __init__(
        self,
        method: EvictionMethod | BoundTransform,
        shape: StepShape,
        device: torch.device,
        rater: StateRater | None = None,
    ) -> None:
        self._method, self._shape, self._device = method, shape, device
        self._kept = shape.kept(method)
        self._own = pages_for(shape.context, shape.page_size) if shape.paged else 0
        kv = KVShape(shape.num_layers, shape.kv_heads, shape.head_dim, shape.dtype, rated=rater is not None)
        num_pages = shape.sequences * (self._own + pages_for(self._kept, shape.page_size)) + 1
        pool = self._pool = KVPool(kv, num_pages, shape.page_size, device)
        if isinstance(method, BoundTransform):
            self._layers = LayerTransformer(method, pool, shape.num_layers)
        else:
            self._layers = LayerCompressor(method, pool, shape.num_layers, shape.rotation(device))
        starts = np.arange(shape.sequences) * shape.context
        lengths = np.full(shape.sequences, shape.context)
        self._where = Packed.of(starts, lengths, device)
        self._work = self._make_work(num_pages, starts, lengths)
        self._step = self._computed()
        self._rater, self._states = rater, self._hidden_states() if rater is not None else None
        if shape.paged:
            self._fill(pool)

    def _make_work(self, num_pages: int, starts: np.ndarray, lengths: np.ndarray) -> Work:
        n = self._shape.sequences
        # Pages in no order, as an allocator hands them out after a while.
        pages = 1 + np.random.default_rng(0).permutation(num_pages - 1).astype(np.int32).reshape(n, -1)
        own = pages[:, : self._own] if self._own else np.zeros((n, 1), np.int32)
        window = (starts + lengths)[:, None] + np.arange(-self._method.window, 0)
        kept, fresh = [self._kept] * n, pages[:, self._own :]
        work = Work.of(own, fresh, lengths, kept, window, self._device, [None] * n)
        return self._layers.planned(work, lengths, [()] * n)

    def _fill(self, pool: KVPool) -> None:
        """Every layer's pages hold the contexts of the step."""
        table, size = self._work.table.long(), self._shape.page_size
        for new, stored in ((self._step.k, pool.keys), (self._step.v, pool.values)):
            padded = self._where.padded(new, self._shape.context)
            padded = F.pad(padded, (0, 0, 0, -self._shape.context % size))
            stored[:, table] = padded.unflatten(2, (-1, size)).transpose(1, 2)

    def _computed(self) -> Computed:
        s = self._shape
        generator = torch.Generator(self._device).manual_seed(0)
        size = (s.num_tokens, s.heads + 2 * s.kv_heads, s.head_dim)
        qkv = torch.randn(size, generator=generator, device=self._device, dtype=s.dtype)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        lse = torch.full((s.num_tokens, s.heads), LSE, device=self._device)
        return Computed(q, k, v, lse)

    def _hidden_states(self) -> tuple[Tensor, Tensor]:
        """(T, n), and the slots of their entries, (T,): -1 of those that are not stored."""
        s = self._shape
        generator = torch.Generator(self._device).manual_seed(1)
        size = (s.num_tokens, s.hidden_size)
        hidden = torch.randn(size, generator=generator, device=self._device, dtype=s.dtype)
        if not s.paged:
            return hidden, torch.full((s.num_tokens,), -1, device=self._device)
        slots = self._work.table.long()[..., None] * s.page_size + torch.arange(
            s.page_size, device=self._device
        )
        return hidden, slots.flatten(1)[:, : s.context].flatten()

    def layer(self, layer: int) -> None:
        step, queries = self._step, None
        if self._rater is not None:
            hidden, slots = self._states
            step = dataclasses.replace(step, ratings=self._rater.rate(layer, hidden))
            self._pool.write_ratings(layer, step.ratings, slots)
        if "window_queries" in self._method.needs:
            queries = step.q[self._work.window_rows].transpose(1, 2)
        if self._shape.paged:
            self._layers.stored(layer, self._work, queries)
        else:
            self._layers.packed(layer, self._work, self._where, step, queries)
