"""Serve a model over HTTP, to OpenAI's clients: completions and chat, streamed or not, metrics for Prometheus.

The API key can also come from the environment variable FASTCACHE_API_KEY, where other users do not see it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastcache.cli_compression import add_compression, compression_of
from fastcache.cli_types import count, number, positive_int
from fastcache.config import DEVICES, DTYPES, LOAD_FORMATS, POLICIES, require

API_KEY_VARIABLE = "FASTCACHE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="a local Hugging Face folder")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="its name for clients; the folder's if not given"
    )
    _add_server(parser.add_argument_group("server"))
    _add_engine(parser.add_argument_group("engine"))


def _add_server(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is every network this machine is in")
    group.add_argument("--port", type=count, default=8000, help="0: any free one")
    group.add_argument("--api-key", metavar="KEY", help=f"clients must send it; or set {API_KEY_VARIABLE}")
    group.add_argument("--max-prompt-tokens", type=positive_int, help="refuse longer prompts")
    group.add_argument(
        "--max-body-bytes", type=positive_int, default=16 * 2**20, help="refuse larger requests"
    )
    group.add_argument(
        "--max-image-bytes", type=positive_int, default=8 * 2**20, help="refuse larger pictures"
    )
    group.add_argument("--max-waiting", type=positive_int, default=256, help="refuse while so many wait")
    group.add_argument(
        "--default-max-tokens", type=positive_int, default=256, help="where a request names none"
    )
    group.add_argument(
        "--timeout", type=number, default=600.0, metavar="S", help="seconds a request may take"
    )
    group.add_argument(
        "--shutdown-timeout", type=number, default=30.0, metavar="S", help="seconds running ones may go on"
    )


def _add_engine(group: Any) -> None:
    add_compression(group)
    group.add_argument(
        "--policy", default="dynamic", help=f"{', '.join(POLICIES)}, or pXcYdZ for fixed batches"
    )
    group.add_argument("--load-format", default="auto", help=f"{' or '.join(LOAD_FORMATS)}")
    group.add_argument("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    group.add_argument("--device", default="auto", help=", ".join(DEVICES))
    group.add_argument("--max-model-len", type=positive_int, help="tokens per sequence, prompt and output")
    group.add_argument("--max-num-seqs", type=positive_int, default=64, help="sequences running at once")
    group.add_argument("--num-pages", type=positive_int, help="size of the KV pool; from memory if not given")
    group.add_argument("--gpu-mem-util", type=number, default=0.9, help="share of the GPU's memory to use")
    group.add_argument("--enable-prefix-caching", action="store_true", help="reuse KV of equal beginnings")


def run(args: argparse.Namespace) -> int:
    options = engine_options(args)
    try:
        from fastcache.serving.config import ServerConfig
        from fastcache.serving.run import make_server
    except ModuleNotFoundError as missing:
        require(False, f"`fastcache serve` needs {missing.name}: pip install 'fastcache[serve]'.")
    config = ServerConfig(
        model_name=args.served_model_name or Path(args.model).resolve().name,
        host=args.host,
        port=args.port,
        api_key=os.environ.get(API_KEY_VARIABLE) if args.api_key is None else args.api_key,
        max_prompt_tokens=args.max_prompt_tokens,
        max_body_bytes=args.max_body_bytes,
        max_image_bytes=args.max_image_bytes,
        default_max_tokens=args.default_max_tokens,
        timeout_s=args.timeout,
        shutdown_s=args.shutdown_timeout,
    )
    from fastcache import LLM  # torch loads here, after the arguments were found to be right

    server = make_server(LLM(args.model, **options), config)
    server.run()
    return 0 if server.started else 1


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Errors: `ConfigError`, `UnknownName`."""
    compression = compression_of(args)
    return {
        "dtype": args.dtype,
        "device": args.device,
        "load_format": args.load_format,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "num_pages": args.num_pages,
        "gpu_memory_utilization": args.gpu_mem_util,
        "enable_prefix_caching": args.enable_prefix_caching,
        "policy": args.policy,
        "max_waiting": args.max_waiting,
        "compression": compression,
    }
