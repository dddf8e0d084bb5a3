"""Which methods exist, and how a configuration becomes one of them.

The names are needed where no torch may be imported (the workflow's graph, the command line's choices), so the
registry holds import paths and loads a method's file when it is created.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

from fastcache.config import CompressionConfig
from fastcache.errors import UnknownName

if TYPE_CHECKING:
    from fastcache.compression.base import EvictionMethod
    from fastcache.compression.transform import TransformMethod

# What a file of head budgets says it is.
BUDGET_FORMAT = "fastcache-head-budgets-1"

METHODS: dict[str, str] = {
    "expected_attention": "fastcache.compression.expected_attention:ExpectedAttention",
    "expected_attention_eps": "fastcache.compression.expected_attention:ExpectedAttentionEps",
    "h2o": "fastcache.compression.h2o:H2O",
    "keydiff": "fastcache.compression.keydiff:KeyDiff",
    "knorm": "fastcache.compression.knorm:KNorm",
    "kvzap": "fastcache.compression.kvzap:KVzap",
    "kvzip": "fastcache.compression.kvzip:KVzip",
    "mlp": "fastcache.compression.mlp:MLP",
    "observed_attention": "fastcache.compression.observed_attention:ObservedAttention",
    "random": "fastcache.compression.random_keep:RandomKeep",
    "snapkv": "fastcache.compression.snapkv:SnapKV",
    "streaming_llm": "fastcache.compression.streaming_llm:StreamingLLM",
    "tova": "fastcache.compression.tova:TOVA",
}
# These make new entries; the others choose among the stored ones.
TRANSFORMS = frozenset({"mlp"})
# These have trained weights, which their parameter `checkpoint` names.
TRAINED = ("kvzap", "mlp")


def method_class(name: str) -> type[EvictionMethod] | type[TransformMethod]:
    """The class behind a method's name. Errors: `UnknownName` with the nearest method."""
    if name not in METHODS:
        raise UnknownName("compression method", name, METHODS)
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def create(config: CompressionConfig) -> EvictionMethod | TransformMethod:
    """The method a configuration names, with its `params`.

    Errors: `UnknownName` for a method or a parameter that does not exist, `ConfigError` for a parameter out
    of its range.
    """
    method = method_class(config.method)
    allowed = [field.name for field in dataclasses.fields(method)]
    for name in config.params:
        if name not in allowed:
            raise UnknownName(f"parameter of the method {config.method!r},", name, allowed)
    return method(**config.params)
