"""Hidden states on their way through the layers: rated where attention reads them, the ratings stored with the KV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn

from fastcache.compression.states import StateRater
from fastcache.core import ForwardBatch, Step
from fastcache.engine.batch import upload
from fastcache.kvcache.pool import KVPool
from fastcache.models.llama import Llama


class StateRatings:
    """Looks over the shoulder of each layer's attention; idle outside `watching`, so a decode graph holds none of it.

    latest: (T, Hk) float32, the ratings of the layer that is being computed.
    """

    def __init__(self, rater: StateRater, model: Llama, pool: KVPool) -> None:
        self.rater, self.pool = rater, pool
        self.latest: Tensor | None = None
        self._slots: Tensor | None = None
        for layer in model.layers:
            layer.attention.register_forward_pre_hook(self._see)

    @contextmanager
    def watching(self, step: Step, batch: ForwardBatch) -> Iterator[None]:
        """Rate the states of `step`, whatever it compresses: a later chunk, or another prompt, may need them."""
        self._slots = batch.slot_mapping
        compressed = np.asarray([chunk.seq.compressed for chunk in step.chunks])
        if compressed.any():
            # Nobody chooses among their entries again, and with ragged heads such a slot may be another's.
            rows = np.repeat(compressed, [chunk.length for chunk in step.chunks])
            (self._slots,) = upload([np.where(rows, -1, batch.host.slots)], self.pool.device)
        try:
            yield
        finally:
            self.latest = self._slots = None

    def _see(self, attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._slots is None:
            return
        self.latest = self.rater.rate(attention.layer, inputs[0])
        self.pool.write_ratings(attention.layer, self.latest, self._slots)
