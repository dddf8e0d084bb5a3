"""Measure what compression methods cost beside a model's prefill on this device, and store it for later runs.

Prints, for a prefill step at the given shape: the bound from bytes moved and products made, the measured time, its
share of the measured prefill, and the memory that a method takes at its peak.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcache.cli_types import names, number, positive_int
from fastcache.compression.registry import TRAINED, create
from fastcache.config import (
    DEVICES,
    LOAD_FORMATS,
    CompressionConfig,
    SamplingParams,
    ratio_of_factor,
    require,
)

LINE = "{:24}{:>10}{:>10}{:>13}{:>9}{:>12}{:>13}\n"
HEADER = ("method", "bound ms", "step ms", "us per layer", "share", "ns per token", "extra MiB")
NOT_COUNTED = "-"
# Those that need nothing but their name and see one prefill; the first of them can also read it back from pages.
PAGED_METHODS = "streaming_llm,knorm,keydiff,random,snapkv,tova"
DEFAULT_METHODS = f"{PAGED_METHODS},expected_attention,h2o,observed_attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="a local Hugging Face folder, or a preset for dummy weights"
    )
    parser.add_argument(
        "--methods", help=f"comma-separated; by default {DEFAULT_METHODS}, with --paged {PAGED_METHODS}"
    )
    parser.add_argument(
        "--paged",
        action="store_true",
        help="compress out of pages, as after chunked prefill, prefix hits and deferral, not out of the step's tensors",
    )
    parser.add_argument(
        "--compressor-path",
        metavar="FILE",
        help="checkpoint of the method 'mlp' or 'kvzap', or 'dummy' with dummy weights",
    )
    parser.add_argument("--batch", type=positive_int, default=32, help="contexts that are prefilled")
    parser.add_argument("--context", type=positive_int, default=3968, help="tokens of each")
    parser.add_argument("--factor", type=number, default=5.0, help="5 keeps a fifth")
    parser.add_argument("--load-format", default="auto", help=" or ".join(LOAD_FORMATS))
    parser.add_argument("--device", default="auto", help=", ".join(DEVICES))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    from fastcache.compression import cost

    methods = _methods(args)
    shape, facts = _prefill(args)
    import torch

    from fastcache.device.ceilings import measure as measure_ceilings
    from fastcache.device.info import device_info, versions

    device = torch.device(facts["device"])
    ceilings = measure_ceilings(facts["device"])
    prefill_s = facts["prefill_seconds_per_token"] * shape.num_tokens
    sys.stdout.write(
        f"{shape.sequences} x {shape.context} tokens in a step of {prefill_s * 1e3:.1f} ms"
        f"{', read back from pages' if shape.paged else ''}; {ceilings}\n"
    )
    sys.stdout.write(LINE.format(*HEADER))
    costs, rows = {}, {}
    for method in _fitted(methods, shape, args.load_format, device):
        measured = cost.measure(method, shape, device, ceilings)
        costs[method.name], rows[method.name] = measured.cost, _row(measured, prefill_s)
        sys.stdout.write(_line(method.name, measured, prefill_s, shape.num_layers))
        sys.stdout.flush()
    facts |= {"device": device_info(facts["device"]), "versions": versions(), "measured": rows}
    cost.save_costs(args.output, costs, facts)
    return 0


def _methods(args: argparse.Namespace) -> list[Any]:
    from fastcache.compression.base import EvictionMethod

    ratio = ratio_of_factor(args.factor)
    chosen = names("--methods", args.methods or (PAGED_METHODS if args.paged else DEFAULT_METHODS))
    trained = [name for name in TRAINED if name in chosen]
    require(
        args.compressor_path is None or len(trained) == 1 or (trained and args.compressor_path == "dummy"),
        f"--compressor-path is the checkpoint of one method; --methods has {', '.join(trained) or 'none'} of "
        f"{', '.join(TRAINED)}. Name one of them, or leave the path out.",
    )
    given = {name: {"checkpoint": args.compressor_path} for name in trained}
    methods = [create(CompressionConfig(name, ratio, given.get(name, {}))) for name in chosen]
    for method in methods:
        if isinstance(method, EvictionMethod):
            method.check(args.context, ratio)
    return methods


def _fitted(methods: list[Any], shape: Any, load_format: str, device: Any) -> Iterator[Any]:
    """The methods, each transform with its weights on the device."""
    from fastcache.compression.transform import ModelFit, TransformMethod

    for method in methods:
        if not isinstance(method, TransformMethod):
            yield method
            continue
        table, dummy = shape.rotation(device).cos_sin, load_format == "dummy"
        fit = (shape.num_layers, shape.head_dim, shape.dtype, device, table, shape.ratio)
        yield method.bind(ModelFit(*fit, dummy_weights=dummy))


def _prefill(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The shape of a prefill step, and what was measured of prefills without compression."""
    import torch

    from fastcache import LLM
    from fastcache.compression.cost_inputs import StepShape

    llm = LLM(args.model, load_format=args.load_format, device=args.device, max_model_len=args.context + 1)
    generator = torch.Generator().manual_seed(0)
    size, model = (args.batch, args.context), llm.model_config
    image = model.vision.image_token_id if model.vision is not None else model.vocab_size
    for _ in range(2):  # the first compiles
        llm.reset_stats()
        prompts = torch.randint(0, min(image, model.vocab_size), size, generator=generator).tolist()
        llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
    stats, engine = llm.stats(), llm.describe()
    facts = {
        "model": args.model,
        "batch": args.batch,
        "context": args.context,
        "factor": args.factor,
        "dtype": engine["dtype"],
        "device": engine["device"],
        "prefill_seconds_per_token": stats.prefill_time_s / stats.prefill_tokens,
    }
    llm.close()
    shape = StepShape(
        model.num_layers,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        getattr(torch, engine["dtype"]),
        args.context,
        max(1, min(args.batch, engine["max_num_batched_tokens"] // args.context)),
        ratio_of_factor(args.factor),
        engine["page_size"],
        args.paged,
        model.hidden_size,
        args.load_format == "dummy",
    )
    return shape, {**facts, "sequences_per_step": shape.sequences, "paged": shape.paged}


def _row(measured: Any, prefill_s: float) -> dict[str, float]:
    return {
        "step_seconds": measured.step_seconds,
        "limit_seconds": measured.limit_seconds,
        "share_of_prefill": measured.step_seconds / prefill_s,
    }


def _line(name: str, measured: Any, prefill_s: float, num_layers: int) -> str:
    extra, per_token = measured.cost.extra_bytes, measured.cost.seconds_per_token
    return LINE.format(
        name,
        f"{measured.limit_seconds * 1e3:.2f}",
        f"{measured.step_seconds * 1e3:.2f}",
        f"{measured.step_seconds / num_layers * 1e6:.0f}",
        f"{measured.step_seconds / prefill_s:.1%}",
        f"{per_token * 1e9:.0f}",
        NOT_COUNTED if extra is None else f"{extra / 2**20:.0f}",
    )
