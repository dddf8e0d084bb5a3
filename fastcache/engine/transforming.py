"""Transforms in the engine: fitted to its model, and the numbers that the scheduler plans with."""

from __future__ import annotations

import torch

from fastcache.compression.transform import BoundTransform, ModelFit, Spans, TransformMethod
from fastcache.config import EngineConfig
from fastcache.errors import UnsupportedCombination
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
