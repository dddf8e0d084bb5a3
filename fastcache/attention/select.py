"""Which backend serves a device: by what is installed and what the device can do, never by its name."""

from __future__ import annotations

import logging

import torch

from fastcache.attention import flashinfer
from fastcache.attention.base import AttentionBackend, HeadShape
from fastcache.attention.torch_sdpa import TorchSDPA
from fastcache.config import one_of
from fastcache.kvcache.pool import KVPool

BACKENDS = {"torch-sdpa": TorchSDPA, "flashinfer": flashinfer.FlashInfer}

log = logging.getLogger(__name__)


def select_backend(name: str, pool: KVPool, heads: HeadShape, device: torch.device) -> AttentionBackend:
    """The backend called `name`, or for "auto" the fastest one that works here.

    Errors: `UnknownName`; `UnsupportedCombination` when the named backend cannot serve this device and dtype.
    """
    one_of("attention backend", name, ("auto", *BACKENDS))
    if name == "auto":
        reason = flashinfer.unsupported(pool, device)
        name = "flashinfer" if reason is None else "torch-sdpa"
        if reason is not None and device.type == "cuda":
            log.warning("attention backend torch-sdpa, the slow reference: %s", reason)
    return BACKENDS[name](pool, heads)
