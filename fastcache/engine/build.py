"""Puts an engine together from its configuration: device, model, pool, backend, scheduler."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.attention.base import AttentionBackend, HeadShape
from fastcache.attention.ragged import with_layouts
from fastcache.attention.select import select_backend
from fastcache.compression.registry import create
from fastcache.compression.transform import BoundTransform, TransformMethod
from fastcache.config import EngineConfig
from fastcache.device.green_context import partition
from fastcache.device.partition import Partition
from fastcache.engine.batch import BatchBuilder
from fastcache.engine.chunks import Limits
from fastcache.engine.cuda_graphs import padded_size
from fastcache.engine.images import PictureEmbedder
from fastcache.engine.memory import pool_room, prefill_tokens
from fastcache.engine.methods import check_method, compressors, method_plan, prompt_of, state_rater
from fastcache.engine.policy import INLINE
from fastcache.engine.replay_compressor import replay_positions
from fastcache.engine.resolve import max_model_len_of, resolve_device, resolve_dtype, resolve_kv_dtype
from fastcache.engine.runner import Runner
from fastcache.engine.scheduler import Scheduler
from fastcache.engine.stages import stage_policy
from fastcache.engine.states import StateRatings
from fastcache.engine.transforming import bind
from fastcache.engine.tuning import compression_places, make_tuner, prefill_splits
from fastcache.kvcache.head_layout import LayoutTable
from fastcache.kvcache.pages import PageAllocator
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.kvcache.prefix import PrefixCache
from fastcache.kvcache.slots import pages_for
from fastcache.models.config import ModelConfig, load_model_config
from fastcache.models.loader import load_model
from fastcache.models.pictures import PictureProcessor, load_processor
from fastcache.models.weights import WeightsInfo
from fastcache.stats import EngineStats
from fastcache.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What `LLM` drives, and what it can say about it."""

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    weights: WeightsInfo
    scheduler: Scheduler
    runner: Runner
    partition: Partition
    eos: frozenset[int]
    max_model_len: int
    dtype: torch.dtype
    processor: PictureProcessor | None = None
    side: Runner | None = None  # of prefills beside decode steps

    def describe(self) -> dict[str, Any]:
        pool, backend, vision = self.runner.pool, self.runner.backend, self.model_config.vision
        return {
            "device": str(self.runner.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kv_dtype": str(pool.shape.stored).removeprefix("torch."),
            "attention_backend": backend.name,
            "ops": self.runner.model.ops.name,
            "weights": self.weights.to_dict(),
            "num_pages": pool.num_pages,
            "page_size": pool.page_size,
            "kv_bytes_per_token": pool.shape.bytes_per_token,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.scheduler.limits.max_num_batched_tokens,
            "policy": self.config.policy,
            "tuning": self.config.tuning,
            "prefix_caching": self.scheduler.prefix is not None,
            "image_token_id": vision.image_token_id if vision is not None else None,
            "tokens_per_image": vision.tokens_per_image if vision is not None else None,
            "partition": self.partition.report(),
            "compressor": self._compressor(),
        }

    def _compressor(self) -> dict[str, Any] | None:
        """Which trained weights compress, if the method has any."""
        if self.runner.states is not None:
            return self.runner.states.rater.describe()
        method = self.runner.compressor.method if self.runner.compressor is not None else None
        return method.describe() if isinstance(method, BoundTransform) else None

    def close(self) -> None:
        for each in (self.runner, self.side):
            if each is not None:
                each.model = each.pool = each.backend = None
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()


def build(config: EngineConfig) -> Parts:
    """Errors: `ModelFolderError`, `UnsupportedArchitecture`, `UnsupportedCombination`, `OutOfPages`, ..."""
    device = resolve_device(config.device)
    model_config = load_model_config(config.model, config.load_format)
    dtype = resolve_dtype(config.dtype, model_config, device)
    max_model_len = max_model_len_of(config, model_config)
    method = create(config.compression) if config.compression else None
    tokens_per_step = prefill_tokens(config, model_config, dtype, device)
    policy = stage_policy(config.policy)
    if method is not None:
        check_method(method, tokens_per_step, policy.deferred)
    vision = model_config.vision
    processor = load_processor(config.model, vision) if vision is not None else None
    split = partition(config.partition, device)
    tokenizer = load_tokenizer(config.model, required=False) if Path(config.model).is_dir() else None
    prompt = prompt_of(method, config, model_config, tokenizer)
    positions = max_model_len + (replay_positions(prompt, method, max_model_len) if prompt else 0)
    model, weights = load_model(
        model_config, config.model, config.load_format, dtype, device, positions, config.seed
    )
    if isinstance(method, TransformMethod):
        method = bind(method, config, model, dtype, device)
    rater = state_rater(method, config, model_config, dtype, device)
    heads = HeadShape(model_config.num_heads, model_config.num_kv_heads, model_config.head_dim)
    stored = resolve_kv_dtype(config.kv_dtype, dtype, device)
    shape = KVShape(
        model_config.num_layers, heads.kv_heads, heads.head_dim, dtype, stored, rated=rater is not None
    )
    ragged = config.compression is not None and config.compression.head_budgets is not None
    # Who balances prefill against decode makes steps as small as decoding asks for.
    small = config.tuning == "all" and not (config.enforce_eager or ragged)
    splits = prefill_splits(config, method, device)
    room = pool_room(config, shape, model, tokens_per_step, max_model_len, device, small, bool(splits))
    splits = splits if room.asides else {}
    pool = KVPool(shape, room.pages, config.page_size, device)
    allocator = PageAllocator(pool.num_pages)
    plan = method_plan(config, method, shape) if method is not None else None
    max_pages = pages_for(max_model_len, config.page_size) + 1  # one more where heads share (`SharedLayout`)
    backend = select_backend(config.attention_backend, pool, heads, device)
    backend.keep_lse = method is not None and "attention_mass" in method.needs
    layouts = LayoutTable(pool, config.max_num_seqs + 1) if ragged else None
    if ragged:
        backend = with_layouts(backend, layouts, padded_size(config.max_num_seqs), max_pages)
    limits = Limits(tokens_per_step, config.max_num_seqs, config.page_size)
    places = compression_places(config, split, method, device)
    tuner = make_tuner(config, limits, pool, places, method, splits)
    scheduler = Scheduler(
        limits,
        allocator,
        EngineStats(),
        PrefixCache(allocator, config.page_size) if config.enable_prefix_caching else None,
        plan,
        tuner if config.tuning == "all" else policy,
        config.immediate_release,
        tuner,
    )
    compress = split.compress if config.partition.enabled else None
    states = StateRatings(rater, model, pool) if rater is not None else None
    inline, deferred = compressors(plan, pool, model, prompt, compress, layouts, states)
    layout_of = scheduler.demand.layout if ragged else None
    runner = Runner(
        model,
        pool,
        backend,
        BatchBuilder(config.max_num_seqs, max_pages, config.page_size, layout_of),
        config.max_num_seqs,
        inline,
        use_graphs=not config.enforce_eager,
        stream=split.main if config.partition.enabled else None,
        places=places,
        pictures=PictureEmbedder(model, processor) if processor is not None else None,
        deferred=deferred,
        states=states,
        small_steps=small,
        sides={name: each.decode for name, each in splits.items()},
    )
    if tuner is not None and runner.compressor is not None:
        runner.compressor.timed = True
    side = None
    if splits:
        own = select_backend(config.attention_backend, pool, heads, device)
        side = side_runner(runner, own, {name: each.prefill for name, each in splits.items()})
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a partition's streams are not ordered behind the default one
    eos = model_config.eos_token_ids
    if tokenizer is not None and not eos:
        eos = frozenset(tokenizer.eos_token_ids)
    return Parts(
        config,
        model_config,
        tokenizer,
        weights,
        scheduler,
        runner,
        split,
        eos,
        max_model_len,
        dtype,
        processor,
        side,
    )


def side_runner(
    runner: Runner, backend: AttentionBackend, sides: Mapping[str, torch.cuda.Stream | None]
) -> Runner:
    """Of prefills beside the decode steps of `runner`: the same model, pages and compressor, an attention backend and
    newest tokens of its own. It runs no decode step, and no step while `runner` runs a prefill; and it has no graphs:
    what short steps would save is little where decode steps go on meanwhile, and capturing would hold those up."""
    return Runner(
        runner.model,
        runner.pool,
        backend,
        runner.builder,
        len(runner.last_tokens) - 1,
        runner.compressor,
        use_graphs=False,
        pictures=runner.pictures,
        places={INLINE: None},
        states=runner.states,
        sides=sides,
    )
