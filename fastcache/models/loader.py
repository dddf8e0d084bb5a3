"""From a folder or preset to a model on a device, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from fastcache.models.config import ModelConfig
from fastcache.models.llama import Llama
from fastcache.models.llava import Llava
from fastcache.models.ops import Ops, select_ops
from fastcache.models.qwen3 import Qwen3
from fastcache.models.weights import WeightsInfo, fill_dummy, load_checkpoint

MODELS: dict[str, type[Llama]] = {"llama": Llama, "llava": Llava, "qwen3": Qwen3}


def load_model(
    config: ModelConfig,
    source: str,
    load_format: str,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int,
    seed: int,
    ops: Ops | None = None,
) -> tuple[Llama, WeightsInfo]:
    """Build and fill the model. `max_positions` sizes the rotary table; `ops` None picks the fastest."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = MODELS[config.architecture](config, ops or select_ops(device), max_positions, device)
    finally:
        torch.set_default_dtype(default)
    if load_format == "dummy":
        return model.eval(), fill_dummy(model, seed, source)
    return model.eval(), load_checkpoint(model, config, Path(source))
