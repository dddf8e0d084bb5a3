"""What "auto" means here: the device, the types and the length of an engine, from its configuration and its model."""

from __future__ import annotations

import torch

from fastcache.config import EngineConfig
from fastcache.errors import ConfigError, UnsupportedCombination
from fastcache.models.config import ModelConfig

FP8_CAPABILITY = (8, 9)  # Ada and Hopper convert to e4m3 in hardware


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where torch sees a GPU. Errors: `UnsupportedCombination` for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedCombination(
            f"device is {name!r}, but torch {torch.__version__} sees no GPU. Use device 'cpu', or install a CUDA "
            "build of torch and check the driver with nvidia-smi."
        )
    device = torch.device(name)
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def resolve_dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own type, except on the CPU, whose 16-bit arithmetic is slow: float32."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype
    return getattr(torch, name)


def resolve_kv_dtype(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the pool stores. Errors: `UnsupportedCombination` for fp8 on a GPU that cannot convert to it."""
    if name == "auto":
        return dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise UnsupportedCombination(
            f"kv_dtype is 'fp8', and {torch.cuda.get_device_name(device)} does not convert to it; allowed is a GPU of "
            "compute capability 8.9 or later, or kv_dtype 'auto'."
        )
    return torch.float8_e4m3fn


def max_model_len_of(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, the model has {limit} positions; allowed is at most that."
        )
    return config.max_model_len or limit
