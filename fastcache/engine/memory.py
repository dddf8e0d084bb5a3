"""How many pages the KV pool gets: what the user allows, less what a full step was seen to need."""

from __future__ import annotations

from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from fastcache.attention.flashinfer import WORKSPACE_BYTES
from fastcache.compression.base import budget
from fastcache.compression.layer import WAITING_BYTES
from fastcache.config import EngineConfig
from fastcache.engine.compressor import SMALL_STEP
from fastcache.engine.side_by_side import MOST_TOKENS as ASIDE_TOKENS
from fastcache.engine.step_graphs import buffer_bytes
from fastcache.errors import OutOfPages
from fastcache.kvcache.pool import KVShape
from fastcache.kvcache.slots import pages_for
from fastcache.models.config import ModelConfig
from fastcache.models.llama import Llama

# On the CPU the pool may use this share of the memory that is free, but needs no more than a batch fills.
CPU_POOL_SHARE = 0.25
CPU_PREFILL_TOKENS = 2_048
# Bounds of one step's prefill, and the share of the memory beside the weights that its activations may take. Larger
# steps fill the matrix units better and leave fewer pages; docs/performance.md has 16k against 32k tokens.
MIN_PREFILL_TOKENS, MAX_PREFILL_TOKENS = 2_048, 32_768
ACTIVATION_SHARE = 0.12
# CUDA graphs, the attention workspace, allocator rounding: kept free beside what the profiling pass saw.
CUDA_RESERVE_BYTES = 1_200 * 2**20
# What a compressed prefill holds beside the pool, in copies of the step's keys and values of one layer: gathered
# pages, the same in the order of heads, the kept entries, and the scores in float32. Counted, then rounded up.
COMPRESSION_COPIES = 6
# Prefills beside decode steps have activations and an attention workspace of their own, unless these cost a larger
# share of the pages that can be used.
ASIDE_SHARE = 0.05


class Room(NamedTuple):
    """Pages of the pool, and whether there is memory for prefills beside decode steps, too."""

    pages: int
    asides: bool


def prefill_tokens(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens one step may compute: on CUDA as many as saturate the matrix units, while their activations stay a
    small share of the memory that the weights leave. Counted from the widest layer, halved until it fits."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    if device.type == "cpu":
        return CPU_PREFILL_TOKENS
    total = torch.cuda.get_device_properties(device).total_memory
    left = total * config.gpu_memory_utilization - model.num_parameters * dtype.itemsize
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = dtype.itemsize * (3 * model.intermediate_size + 4 * model.hidden_size + heads)
    tokens = MAX_PREFILL_TOKENS
    while tokens > MIN_PREFILL_TOKENS and tokens * per_token > ACTIVATION_SHARE * left:
        tokens //= 2
    return tokens


def pool_room(
    config: EngineConfig,
    shape: KVShape,
    model: Llama,
    tokens_per_step: int,
    max_model_len: int,
    device: torch.device,
    small_steps: bool = False,
    asides: bool = False,
) -> Room:
    """How large the pool is. `small_steps`: whether short steps have buffers of their own (`step_graphs`); `asides`:
    whether prefills beside decode steps are wanted. Errors: `OutOfPages` when there is no room for a page, with the
    remedy."""
    if config.num_pages is not None:
        return Room(config.num_pages, asides)
    page_bytes = shape.slot_bytes * config.page_size
    useful = config.max_num_seqs * _pages_per_sequence(config, max_model_len) + 1
    aside_bytes = 0
    if device.type == "cpu":
        available = int(psutil.virtual_memory().available * CPU_POOL_SHARE)
    else:
        peak = _peak_activation_bytes(model, tokens_per_step, config.max_num_seqs, device)
        buffers = buffer_bytes(model.config, shape.dtype) if small_steps else 0
        available = _free_bytes(config, device) - _step_bytes(config, peak, tokens_per_step, shape) - buffers
        tokens = min(ASIDE_TOKENS, tokens_per_step)
        aside_bytes = _step_bytes(config, peak * tokens // tokens_per_step, tokens, shape) + WORKSPACE_BYTES
    pages = available // page_bytes
    if pages < 2:
        raise OutOfPages(
            f"no memory is left for a KV pool: one page of {config.page_size} tokens takes {page_bytes:,} bytes, "
            f"{max(available, 0):,} are free. Raise gpu_memory_utilization (now {config.gpu_memory_utilization}), "
            f"lower max_num_batched_tokens (now {tokens_per_step}), or use a smaller model."
        )
    fewer = (available - aside_bytes) // page_bytes
    asides = asides and fewer >= (1 - ASIDE_SHARE) * min(useful, pages)
    return Room(min(useful, fewer if asides else pages), asides)


def _pages_per_sequence(config: EngineConfig, max_model_len: int) -> int:
    pages = pages_for(max_model_len, config.page_size)
    if config.compression is not None:  # the full cache and the kept copy stand side by side for a moment
        kept = budget(max_model_len, config.compression.compression_ratio)
        pages += pages_for(kept, config.page_size)
    return pages


def _step_bytes(config: EngineConfig, peak: int, tokens: int, shape: KVShape) -> int:
    """What a step of `tokens` takes whose forward pass takes `peak`."""
    return peak if config.compression is None else with_compression(peak, tokens, shape)


def _free_bytes(config: EngineConfig, device: torch.device) -> int:
    """What the configuration allows and nobody uses yet, less what is kept free."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - CUDA_RESERVE_BYTES


def with_compression(peak: int, tokens: int, shape: KVShape) -> int:
    """What a step takes that compresses what it prefills: a full one, layer by layer, or a small one, whose layers wait
    for each other. peak: of a full step of `tokens` without compression."""
    full = peak + COMPRESSION_COPIES * tokens * shape.layer_bytes
    return max(full, peak * min(tokens, SMALL_STEP) // tokens + WAITING_BYTES)


@torch.inference_mode()
def _peak_activation_bytes(model: Llama, tokens: int, max_num_seqs: int, device: torch.device) -> int:
    """What a forward pass over `tokens` tokens allocates on top of the weights, measured by running one."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    embeddings = _picture_embeddings(model, tokens, device)
    hidden = model(ids, ids, lambda layer, q, k, v: torch.empty_like(q), embeddings)
    model.logits(hidden[:max_num_seqs])
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def _picture_embeddings(model: Llama, tokens: int, device: torch.device) -> Tensor | None:
    """Those of a step of pictures alone, the most that a step can hold; None for a model that reads text alone."""
    vision = model.config.vision
    if vision is None:
        return None
    shape = (pages_for(tokens, vision.tokens_per_image), vision.num_channels)
    pixels = torch.zeros((*shape, vision.image_size, vision.image_size), device=device)
    return model.embed_pictures(pixels).flatten(0, 1)[:tokens].clone()
