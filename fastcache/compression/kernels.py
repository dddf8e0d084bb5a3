"""Who carries a compression out on a device: torch anywhere, Triton on CUDA. Same signatures, same kept sets.

A method is its file; `importance` here holds faster versions of some methods' `importance`, by name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastcache.compression import base, observe
from fastcache.compression.base import EvictionMethod, LayerKV
from fastcache.compression.repack import repack_heads, repack_heads_pages, repack_pages

Importance = Callable[[EvictionMethod, LayerKV], Tensor]


@dataclass(frozen=True)
class Kernels:
    """`select` as `base.select`; `repack` as `repack_triton.repack_packed`, None where there is only torch's;
    other names with `repack` as in `repack.py`; `attention_mass` and `query_statistics` as in `observe`."""

    name: str
    select: Callable[..., Tensor]
    repack: Callable[..., None] | None = None
    repack_pages: Callable[..., None] = repack_pages
    repack_heads: Callable[..., None] = repack_heads
    repack_heads_pages: Callable[..., None] = repack_heads_pages
    attention_mass: Callable[..., Tensor] = observe.attention_mass
    query_statistics: Callable[..., tuple[Tensor, Tensor]] = observe.query_statistics
    importance: Mapping[str, Importance] = field(default_factory=dict)

    def score(self, method: EvictionMethod, kv: LayerKV) -> Tensor:
        """As `method.score(kv)`."""
        return method.score(kv, self.importance.get(method.name))


TORCH = Kernels("torch", base.select)


def kernels_for(device: torch.device) -> Kernels:
    """The fastest that this device and installation have."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return TORCH
    return triton_kernels()


def triton_kernels() -> Kernels:
    """Written in Triton. Imports it, so that the rest of the package runs without."""
    from fastcache.compression import (
        expected_attention_triton,
        keydiff_triton,
        observe_triton,
        repack_heads_triton,
        repack_triton,
        select_triton,
        window_triton,
    )

    fast = {
        "expected_attention": expected_attention_triton.expected_attention,
        "expected_attention_eps": expected_attention_triton.expected_attention,
        "keydiff": keydiff_triton.keydiff,
        "snapkv": window_triton.snapkv,
        "tova": window_triton.tova,
    }
    return Kernels(
        "triton",
        select_triton.select,
        repack_triton.repack_packed,
        repack_triton.repack_pages,
        repack_heads_triton.repack_heads,
        repack_heads_triton.repack_heads_pages,
        observe_triton.attention_mass,
        observe_triton.query_statistics,
        fast,
    )
