"""From a configured method to what the engine needs of it: its numbers, its checks, and who carries it out."""

from __future__ import annotations

from typing import Any

import torch

from fastcache.compression.adakv import ADAKV, GLOBAL
from fastcache.compression.base import EvictionMethod
from fastcache.compression.head_budgets import HeadBudgets
from fastcache.compression.states import StateFit, StateMethod, StateRater
from fastcache.compression.transform import BoundTransform
from fastcache.compression.work import Rotation
from fastcache.config import EngineConfig
from fastcache.engine.compressor import InlineCompressor, MethodPlan
from fastcache.engine.deferred import DEFERRABLE_NEEDS, DeferredCompressor
from fastcache.engine.replay import ReplayPrompt, replay_prompt
from fastcache.engine.replay_compressor import ReplayCompressor
from fastcache.engine.stages import stage_policy
from fastcache.engine.states import StateRatings
from fastcache.engine.transforming import TransformPlan
from fastcache.errors import ConfigError, UnsupportedCombination
from fastcache.kvcache.head_layout import LayoutTable
from fastcache.kvcache.pool import KVPool, KVShape
from fastcache.models.config import ModelConfig
from fastcache.models.llama import Llama
from fastcache.models.rope import inverse_frequencies
from fastcache.tokenizer import Tokenizer


def compressors(
    plan: MethodPlan | None,
    pool: KVPool,
    model: Llama,
    prompt: ReplayPrompt | None,
    stream: torch.cuda.Stream | None,
    table: LayoutTable | None,
    states: StateRatings | None = None,
) -> tuple[InlineCompressor | None, DeferredCompressor | None]:
    """Who compresses inside a prefill step, and who after it; None without a method."""
    if plan is None:
        return None, None
    layers = pool.shape.num_layers
    deferred = DeferredCompressor(plan.method, pool, layers, stream, plan.layout)
    if prompt is not None:
        inline = ReplayCompressor(plan.method, pool, model, prompt, plan.layout)
    else:
        frequencies = inverse_frequencies(model.config.rope, model.config.head_dim)
        rotation = Rotation(model.cos_sin, frequencies.to(model.cos_sin.device))
        inline = InlineCompressor(plan.method, pool, layers, stream, plan.layout, rotation)
    inline.table, inline.states = table, states
    return inline, deferred


def state_rater(
    method: EvictionMethod | BoundTransform | None,
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> StateRater | None:
    """Who rates hidden states, for a method that needs them. Errors: `ConfigError`, `CheckpointError`."""
    if not isinstance(method, StateMethod):
        return None
    sizes = (model.num_layers, model.hidden_size, model.num_kv_heads)
    return method.rater(StateFit(*sizes, dtype, device, config.load_format == "dummy"))


def method_plan(
    config: EngineConfig, method: EvictionMethod | BoundTransform, shape: KVShape
) -> MethodPlan | TransformPlan:
    """Errors: `ConfigError` for head budgets that cannot be read or were calibrated on another model's shape."""
    if isinstance(method, BoundTransform):
        return TransformPlan(method)
    path = budgets = config.compression.head_budgets
    if path in (ADAKV, GLOBAL):
        _check_shared(path, method, config)
    elif path is not None:
        budgets = HeadBudgets.load(path)
        if budgets.shape != (shape.num_layers, shape.kv_heads):
            raise ConfigError(
                f"head_budgets {path!r} is for (layers, kv_heads) {budgets.shape}, this model has "
                f"{(shape.num_layers, shape.kv_heads)}. Run `fastcache calibrate` on this model."
            )
    heads = (shape.num_layers, shape.kv_heads)
    return MethodPlan(method, config.compression.compression_ratio, config.page_size, budgets, heads)


def _check_shared(name: str, method: EvictionMethod, config: EngineConfig) -> None:
    """Errors: `UnsupportedCombination` where heads cannot share a budget."""
    if name == GLOBAL and "replay_scores" not in method.needs:
        raise UnsupportedCombination(
            f"head_budgets is {GLOBAL!r}, and the scores of {method.name!r} are not all there when the first layer is "
            f"compressed; allowed is the method 'kvzip', or head_budgets {ADAKV!r} or a file."
        )
    if stage_policy(config.policy).deferred or config.tuning != "off":
        raise UnsupportedCombination(
            f"head_budgets {name!r} decides inside the prefill, and this policy or tuning may compress after it. Use "
            "policy default, fcfs or dynamic with tuning off, or head_budgets from a file."
        )


def prompt_of(
    method: EvictionMethod | None, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer | None
) -> ReplayPrompt | None:
    """What a method that repeats contexts says to the model, None for any other. Errors: `UnsupportedCombination`."""
    if method is None or "replay_scores" not in method.needs:
        return None
    if config.partition.enabled or model.vision is not None:
        what = "an SM partition" if config.partition.enabled else "pictures"
        raise UnsupportedCombination(
            f"method {method.name!r} repeats the context with the model itself, which does not go with {what}. Use "
            "another method, or leave that out."
        )
    return replay_prompt(tokenizer)


def check_method(method: Any, tokens_per_step: int, deferred: bool) -> None:
    """Errors: `UnsupportedCombination`, `ConfigError` for what a method wants and this engine does not give."""
    kept_needs = method.needs - DEFERRABLE_NEEDS
    if deferred and kept_needs:
        raise UnsupportedCombination(
            f"method {method.name!r} needs {', '.join(sorted(kept_needs))} of the prefill itself, and a policy with "
            "fixed batches compresses after it. Use policy default, fcfs or dynamic, or another method."
        )
    if method.window > tokens_per_step:
        raise ConfigError(
            f"max_num_batched_tokens is {tokens_per_step}; method {method.name!r} looks at the last {method.window} "
            f"queries at once, so allowed is at least {method.window}."
        )
