"""Which backend serves a device: by what is installed and what the device can do, never by its name."""

from __future__ import annotations

import torch

from fastcache.attention.base import AttentionBackend, HeadShape
from fastcache.attention.torch_sdpa import TorchSDPA
from fastcache.errors import UnknownName
from fastcache.kvcache.pool import KVPool

BACKENDS = ("torch-sdpa",)


def select_backend(name: str, pool: KVPool, heads: HeadShape, device: torch.device) -> AttentionBackend:
    """The backend called `name`, or for "auto" the fastest one that works here."""
    if name not in ("auto", *BACKENDS):
        raise UnknownName("attention backend", name, ("auto", *BACKENDS))
    return TorchSDPA(pool, heads)
