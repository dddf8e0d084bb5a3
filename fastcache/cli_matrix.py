"""The flags of the matrix benchmark, and what they say in the form of `config/config.yaml`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastcache.bench import models
from fastcache.bench.axes import complete_split
from fastcache.bench.matrix import VARIANTS, WORKLOADS
from fastcache.cli_types import count, names, number, positive_int, values
from fastcache.compression.registry import METHODS, TRAINED
from fastcache.config import DEVICES, DTYPES, KV_DTYPES, LOAD_FORMATS, one_of, require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_what(parser.add_argument_group("what to measure"))
    _add_requests(parser.add_argument_group("requests"))
    _add_method(parser.add_argument_group("compression and green contexts"))
    _add_engine(parser.add_argument_group("engine and measurement"))


def _add_what(group: Any) -> None:
    group.add_argument(
        "--output", type=Path, default=Path("kvcache_matrix_results.json"), help="the JSON list"
    )
    group.add_argument(
        "--resume", action="store_true", help="keep rows that succeeded with the same parameters"
    )
    group.add_argument(
        "--models", default="", help=f"of {', '.join(models.MODELS)}; empty: those whose folder is given"
    )
    for alias in models.MODELS.values():
        group.add_argument(alias.flag, metavar="PATH", dest=_dest(alias), help=f"folder of {alias.title}")
    group.add_argument("--compressor-path", metavar="FILE", help="checkpoint of 'mlp' or 'kvzap', or 'dummy'")
    group.add_argument(
        "--workloads", default="", help=f"of {', '.join(WORKLOADS)}; empty: those whose input is given"
    )
    group.add_argument("--variants", default="", help=f"of {', '.join(VARIANTS)}; empty: all")


def _add_requests(group: Any) -> None:
    group.add_argument("--dataset-dir", metavar="PATH", help="prompt sets of light-dataset: json, jsonl, csv")
    group.add_argument("--trace-conv", metavar="FILE", help="trace of heavy-trace: CSV of the Azure format")
    group.add_argument(
        "--synthetic-context", type=positive_int, default=3072, help="prompt tokens (also of english-prose)"
    )
    group.add_argument(
        "--synthetic-output", type=positive_int, default=512, help="generated tokens (also of english-prose)"
    )
    group.add_argument(
        "--synthetic-images",
        type=count,
        default=0,
        help="pictures per request; their tokens count in the prompt's",
    )
    group.add_argument("--synthetic-token", default="", help="fill every prompt with this text, repeated")
    group.add_argument(
        "--synthetic-dialogue", action="store_true", help="fill prompts with a dialogue pattern"
    )
    group.add_argument(
        "--synthetic-num-batches", type=positive_int, default=2, help="batches per repeat, one after another"
    )
    group.add_argument(
        "--synthetic-batch-sizes",
        default="",
        help="requests at once, comma-separated; empty: each model's own",
    )


def _add_method(group: Any) -> None:
    group.add_argument(
        "--method",
        help=f"of {', '.join(METHODS)}; comma-separated; if not given, snapkv, and mlp for llava-mlp with a "
        "--compressor-path",
    )
    group.add_argument("--compression-factor", default="5", help="5 keeps a fifth; comma-separated")
    group.add_argument("--greenctx-compress-ratio", type=number, help="share of the SMs; 0.25 if not given")
    group.add_argument("--greenctx-main-ratio", type=number, help="share of the SMs; the rest if not given")
    group.add_argument(
        "--greenctx-main-stream", action="store_true", help="confine prefill and decode to their share, too"
    )
    group.add_argument(
        "--require-greenctx", action="store_true", help="plain streams instead of green contexts are an error"
    )


def _add_engine(group: Any) -> None:
    group.add_argument("--load-format", default="auto", help=f"{' or '.join(LOAD_FORMATS)} (seeded weights)")
    group.add_argument("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    group.add_argument(
        "--kv-dtype", default="auto", help=f"what the KV pool stores: {' or '.join(KV_DTYPES)}"
    )
    group.add_argument("--device", default="auto", help=", ".join(DEVICES))
    group.add_argument("--gpu-mem-util", type=number, default=0.9, help="share of the GPU's memory to use")
    group.add_argument(
        "--max-model-len", type=positive_int, help="tokens per sequence; at most 4096 if not given"
    )
    group.add_argument("--num-pages", type=positive_int, help="size of the KV pool; from memory if not given")
    group.add_argument("--repeats", type=positive_int, default=3, help="timed rounds per cell")
    group.add_argument("--warmup", type=count, default=1, help="rounds before the timed ones")
    group.add_argument("--seed", type=count, default=0, help="of prompts, dummy weights and sampling")
    group.add_argument("--timeout", type=number, default=1800.0, metavar="S", help="seconds allowed per cell")


def matrix_config(args: argparse.Namespace) -> dict[str, Any]:
    """The command line in the form of `config/config.yaml`. Errors: `UnknownName`, `ConfigError`."""
    split = complete_split(args.greenctx_compress_ratio, args.greenctx_main_ratio)
    config = {
        "models": _models(args),
        "workloads": [_workload(args, name) for name in _workload_names(args)],
        "methods": [_method(args, name) for name in names("--method", args.method or "snapkv")],
        "compression_factors": values("--compression-factor", args.compression_factor, number),
        "greenctx": {
            "splits": [{"compress_ratio": split[0], "main_ratio": split[1]}],
            "main_stream": args.greenctx_main_stream,
            "require": args.require_greenctx,
        },
        "engine": {
            "dtype": args.dtype,
            "kv_dtype": args.kv_dtype,
            "device": args.device,
            "gpu_mem_util": args.gpu_mem_util,
            "max_model_len": args.max_model_len,
            "num_pages": args.num_pages,
        },
        "measure": {
            "repeats": args.repeats,
            "warmup": args.warmup,
            "seed": args.seed,
            "timeout_s": args.timeout,
        },
    }
    if args.variants:
        config["variants"] = names("--variants", args.variants)
    if args.synthetic_batch_sizes:
        sizes = values("--synthetic-batch-sizes", args.synthetic_batch_sizes, positive_int)
        config["batch_sizes"] = sizes
    return config


def _models(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    one_of("load format", args.load_format, LOAD_FORMATS)
    paths = {alias.name: getattr(args, _dest(alias)) for alias in models.MODELS.values()}
    chosen = names("--models", args.models) if args.models else [name for name in paths if paths[name]]
    require(
        bool(chosen),
        "no model to measure: give a folder with "
        f"{', '.join(alias.flag for alias in models.MODELS.values())}, or name models with --models and "
        "--load-format dummy.",
    )
    for name in chosen:
        models.alias(name)
    entries = {name: {"path": paths[name], "load_format": args.load_format} for name in chosen}
    if args.compressor_path is not None and args.method is None and "llava-mlp" in entries:
        entries["llava-mlp"]["methods"] = [_method(args, "mlp")]
        return entries
    trained = set(TRAINED) & set(names("--method", args.method or "snapkv"))
    require(
        args.compressor_path is None or len(trained) == 1 or (trained and args.compressor_path == "dummy"),
        "--compressor-path is the checkpoint of one method; add `--method mlp` or `--method kvzap`, or leave it out.",
    )
    return entries


def _method(args: argparse.Namespace, name: str) -> str | dict[str, Any]:
    """A method by its name, and one with trained weights with the checkpoint it was given."""
    if name not in TRAINED or args.compressor_path is None:
        return name
    return {"name": name, "params": {"checkpoint": args.compressor_path}}


def _workload_names(args: argparse.Namespace) -> list[str]:
    if args.workloads:
        return names("--workloads", args.workloads)
    given = {"light-dataset": args.dataset_dir, "heavy-trace": args.trace_conv}
    return [name for name in WORKLOADS if given.get(name, True)]


def _workload(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The workloads with the lengths of the guide; those of the flags where the guide has flags."""
    if name == "light-dataset":
        lengths = {"context": 128, "output": 64, "num_batches": 1, "min_prompt_tokens": 32}
        return {"name": name, "dataset_dir": args.dataset_dir, **lengths}
    if name == "heavy-trace":
        lengths = {"context": 3584, "output": 512, "num_batches": 4, "min_prompt_tokens": 1024}
        return {"name": name, "trace": args.trace_conv, **lengths}
    flags = {
        "context": args.synthetic_context,
        "output": args.synthetic_output,
        "num_batches": args.synthetic_num_batches,
        "images": args.synthetic_images,
    }
    if name == "synthetic-long":
        flags |= {"token": args.synthetic_token or None, "dialogue": args.synthetic_dialogue}
    return {"name": name, **flags}


def _dest(alias: models.ModelAlias) -> str:
    return "path_" + alias.name.replace("-", "_")
