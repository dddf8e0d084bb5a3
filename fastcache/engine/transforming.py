"""Transforms in the engine: what the scheduler plans with, and the step from one layer's cache to its new entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Many

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.base import LayerKV
from fastcache.compression.transform import BoundTransform, ModelFit, Spans, TransformMethod
from fastcache.compression.work import Computed, Packed, Work
from fastcache.config import EngineConfig
from fastcache.errors import UnsupportedCombination
from fastcache.kvcache.pool import KVPool
from fastcache.models.llama import Llama


def bind(
    method: TransformMethod, config: EngineConfig, model: Llama, dtype: torch.dtype, device: torch.device
) -> BoundTransform:
    """Errors: `CheckpointError`, `ConfigError`, and `UnsupportedCombination` for head budgets."""
    if config.compression.head_budgets is not None:
        raise UnsupportedCombination(
            f"method {method.name!r} makes equally many entries for all KV heads, so it takes no head_budgets."
        )
    shape = model.config
    fit = ModelFit(
        shape.num_layers,
        shape.head_dim,
        dtype,
        device,
        model.cos_sin,
        config.compression.compression_ratio,
        shape.vision is not None,
        config.load_format == "dummy",
    )
    return method.bind(fit)


class TransformPlan:
    """The numbers of a transform that the scheduler plans with (see `demand.CompressionPlan`)."""

    def __init__(self, method: BoundTransform) -> None:
        self.method, self.replays = method, False

    def tail(self, num_tokens: int) -> int:
        return max(self.method.window, 1)

    def kept(self, num_tokens: int, image_spans: Spans = ()) -> int:
        return self.method.kept(num_tokens, image_spans)

    def layout(self, num_tokens: int) -> None:
        """All heads keep the same number."""


class LayerTransformer:
    """Makes and stores the new entries of one layer, n sequences at once; the counterpart of `LayerCompressor`."""

    def __init__(self, method: BoundTransform, pool: KVPool, num_layers: int) -> None:
        self.method, self.pool, self.num_layers = method, pool, num_layers

    def planned(self, work: Work, lengths: Many[int], image_spans: Many[Spans]) -> Work:
        """`work` with the plan that its sequences share in all layers."""
        return dataclasses.replace(work, plan=self.method.plan([int(n) for n in lengths], image_spans))

    def stored(self, layer: int, work: Work, queries: None, replayed: None = None) -> None:
        """Contexts out of their pages."""
        self._store(layer, work, *self.pool.gather(layer, work.table, work.max_length))

    def packed(self, layer: int, work: Work, where: Packed, step: Computed, queries: None) -> None:
        """Contexts out of what the step has computed."""
        self._store(layer, work, where.padded(step.k, work.max_length), where.padded(step.v, work.max_length))

    def _store(self, layer: int, work: Work, keys: Tensor, values: Tensor) -> None:
        kv = LayerKV(layer, self.num_layers, keys, values, work.lengths, work.budgets)
        room = work.fresh.shape[1] * self.pool.page_size
        new = (F.pad(x, (0, 0, 0, room - x.shape[2])) for x in self.method.transform(kv, work.plan))
        self.pool.write_kept(layer, *new, work.fresh)
