"""Puts an engine together from its configuration: device, model, pool, backend, scheduler."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from fastcache.attention.base import HeadShape
from fastcache.attention.select import select_backend
from fastcache.compression.base import budget
from fastcache.compression.registry import create
from fastcache.config import PREFILL_TOKENS, EngineConfig
from fastcache.core import EngineStats
from fastcache.engine.batch import BatchBuilder
from fastcache.engine.compressor import SUPPORTED_NEEDS, InlineCompressor, MethodPlan
from fastcache.engine.runner import Runner
from fastcache.engine.scheduler import Limits, Scheduler
from fastcache.errors import ConfigError, OutOfPages, UnsupportedCombination
from fastcache.kvcache.pages import PageAllocator
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.kvcache.prefix import PrefixCache
from fastcache.kvcache.slots import pages_for
from fastcache.models.config import ModelConfig, load_model_config
from fastcache.models.loader import load_model
from fastcache.models.weights import WeightsInfo
from fastcache.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

# On the CPU the pool may use this share of the memory that is free, but needs no more than a batch fills.
CPU_POOL_SHARE = 0.25


@dataclass
class Parts:
    """What `LLM` drives, and what it can say about it."""

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    weights: WeightsInfo
    scheduler: Scheduler
    runner: Runner
    eos: frozenset[int]
    max_model_len: int
    dtype: torch.dtype

    def describe(self) -> dict[str, Any]:
        pool, backend = self.runner.pool, self.runner.backend
        return {
            "device": str(self.runner.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention_backend": backend.name,
            "ops": self.runner.model.ops.name,
            "weights": self.weights.to_dict(),
            "num_pages": pool.num_pages,
            "page_size": pool.page_size,
            "kv_bytes_per_token": pool.shape.bytes_per_token,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.scheduler.limits.max_num_batched_tokens,
            "prefix_caching": self.scheduler.prefix is not None,
        }

    def close(self) -> None:
        self.runner.model = self.runner.pool = self.runner.backend = None
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()


def build(config: EngineConfig) -> Parts:
    """Errors: `ModelFolderError`, `UnsupportedArchitecture`, `UnsupportedCombination`, `OutOfPages`, ..."""
    device = resolve_device(config.device)
    model_config = load_model_config(config.model, config.load_format)
    dtype = resolve_dtype(config.dtype, model_config, device)
    max_model_len = _max_model_len(config, model_config)
    method = create(config.compression) if config.compression else None
    tokens_per_step = config.max_num_batched_tokens or PREFILL_TOKENS[device.type]
    if method is not None:
        _check_method(method, tokens_per_step)
    # One position more than max_model_len: padded rows of a batch sit at position 0, real ones below it.
    model, weights = load_model(
        model_config, config.model, config.load_format, dtype, device, max_model_len, config.seed
    )
    heads = HeadShape(model_config.num_heads, model_config.num_kv_heads, model_config.head_dim)
    shape = KVShape(model_config.num_layers, heads.kv_heads, heads.head_dim, dtype)
    pool = KVPool(shape, _num_pages(config, shape, max_model_len, device), config.page_size, device)
    allocator = PageAllocator(pool.num_pages)
    scheduler = Scheduler(
        Limits(tokens_per_step, config.max_num_seqs, config.page_size),
        allocator,
        EngineStats(),
        PrefixCache(allocator, config.page_size) if config.enable_prefix_caching else None,
        MethodPlan(method, config.compression.compression_ratio) if method is not None else None,
    )
    runner = Runner(
        model,
        pool,
        select_backend(config.attention_backend, pool, heads, device),
        BatchBuilder(
            config.max_num_seqs, pages_for(max_model_len, config.page_size), config.page_size, device
        ),
        config.max_num_seqs,
        InlineCompressor(method, pool, model_config.num_layers) if method is not None else None,
    )
    tokenizer = load_tokenizer(config.model, required=False) if Path(config.model).is_dir() else None
    eos = model_config.eos_token_ids
    if tokenizer is not None and not eos:
        eos = frozenset(tokenizer.eos_token_ids)
    return Parts(config, model_config, tokenizer, weights, scheduler, runner, eos, max_model_len, dtype)


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


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, the model has {limit} positions; allowed is at most that."
        )
    return config.max_model_len or limit


def _check_method(method: Any, tokens_per_step: int) -> None:
    missing = method.needs - SUPPORTED_NEEDS
    if missing:
        raise UnsupportedCombination(
            f"method {method.name!r} needs {', '.join(sorted(missing))}, which the engine does not collect."
        )
    if method.window > tokens_per_step:
        raise ConfigError(
            f"max_num_batched_tokens is {tokens_per_step}; method {method.name!r} looks at the last {method.window} "
            f"queries at once, so allowed is at least {method.window}."
        )


def _num_pages(config: EngineConfig, shape: KVShape, max_model_len: int, device: torch.device) -> int:
    if config.num_pages is not None:
        return config.num_pages
    page_bytes = shape.bytes_per_token * config.page_size
    if device.type == "cpu":
        per_sequence = pages_for(max_model_len, config.page_size)
        if config.compression is not None:  # the full cache and the kept copy stand side by side for a moment
            kept = budget(max_model_len, config.compression.compression_ratio)
            per_sequence += pages_for(kept, config.page_size)
        useful = config.max_num_seqs * per_sequence + 1
        affordable = int(psutil.virtual_memory().available * CPU_POOL_SHARE) // page_bytes
    else:
        free, total = torch.cuda.mem_get_info(device)
        useful = affordable = int(free - total * (1 - config.gpu_memory_utilization)) // page_bytes
    if affordable < 2:
        raise OutOfPages(
            f"no memory is left for a KV pool: one page of {config.page_size} tokens takes {page_bytes:,} bytes. "
            "Free memory, raise gpu_memory_utilization, or set num_pages."
        )
    return min(useful, affordable)
