"""FastCache: does compressing the KV cache make LLM serving better on your machine?

`import fastcache` costs no torch: the workflow imports it to build its graph. `LLM` loads on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastcache.config import CompressionConfig, SamplingParams

if TYPE_CHECKING:
    from fastcache.engine.engine import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "CompressionConfig", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from fastcache.engine.engine import LLM

        return LLM
    raise AttributeError(f"module 'fastcache' has no attribute {name!r}")
