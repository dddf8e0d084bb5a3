"""Serves an engine until it is told to stop: no new connections, running answers to their end, then the engine."""

from __future__ import annotations

import math
from typing import Any

import uvicorn

from fastcache.config import require
from fastcache.serving.app import make_app
from fastcache.serving.config import ServerConfig


def make_server(llm: Any, config: ServerConfig) -> uvicorn.Server:
    """A server that owns `llm`. Errors: `ConfigError` for a model folder without a tokenizer."""
    require(
        llm.tokenizer is not None,
        "a server needs the model's tokenizer; add tokenizer.json and the files beside it to the model's folder.",
    )
    return uvicorn.Server(
        uvicorn.Config(
            make_app(llm, config),
            host=config.host,
            port=config.port,
            access_log=False,
            log_level="info",
            timeout_graceful_shutdown=math.ceil(config.shutdown_s),
        )
    )
