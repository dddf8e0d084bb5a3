"""The flags of commands that run one engine with one way to compress."""

from __future__ import annotations

import argparse

from fastcache.cli_types import number
from fastcache.compression.registry import METHODS, TRAINED
from fastcache.config import CompressionConfig, one_of, require


def add_compression(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--method", help=f"compress with one of {', '.join(METHODS)}")
    parser.add_argument("--compression-factor", type=number, help="5 keeps a fifth; needs --method")
    parser.add_argument(
        "--compressor-path",
        metavar="FILE",
        help=f"checkpoint of a method with trained weights: {', '.join(TRAINED)}; or 'dummy' with dummy weights",
    )


def compression_of(args: argparse.Namespace) -> CompressionConfig | None:
    """Errors: `ConfigError`, `UnknownName`."""
    if args.method is None:
        require(args.compression_factor is None, "--compression-factor needs --method, the way to compress.")
    else:
        one_of("method", args.method, tuple(METHODS))
    require(
        args.compressor_path is None or args.method in TRAINED,
        f"--compressor-path is the checkpoint of {' or '.join(TRAINED)}; name one with --method, or leave it out.",
    )
    if args.method is None:
        return None
    factor = 5.0 if args.compression_factor is None else args.compression_factor
    params = {} if args.compressor_path is None else {"checkpoint": args.compressor_path}
    return CompressionConfig.from_dict(
        {"method": args.method, "compression_factor": factor, "params": params}
    )
