"""The axes of a matrix: what a config lists, read key by key into settings of a cell. Imports no torch.

What `matrix` says about the config's form holds here; an unknown key is an error that names its nearest neighbour.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastcache.bench import models
from fastcache.bench.cellconfig import GREENCTX_VARIANTS
from fastcache.bench.workloadconfig import WorkloadConfig
from fastcache.config import VARIANTS, one_of, open_interval, positive_int, require
from fastcache.errors import ConfigError

MATRIX_KEYS = (
    "models",
    "workloads",
    "variants",
    "methods",
    "batch_sizes",
    "compression_factors",
    "greenctx",
    "policies",
    "engine",
    "machine",
    "measure",
)
MACHINE_KEYS = ("memory_gib", "keep_process_s")
ENGINE_KEYS = (
    "dtype",
    "kv_dtype",
    "device",
    "gpu_mem_util",
    "page_size",
    "max_model_len",
    "max_num_batched_tokens",
    "num_pages",
    "enable_prefix_caching",
    "attention_backend",
    "enforce_eager",
    "immediate_release",
)
MEASURE_KEYS = ("repeats", "warmup", "seed", "timeout_s")
# Keys of a workload entry that say with what its requests are combined, not what they are.
WORKLOAD_AXES = (
    "models",
    "batch_sizes",
    "variants",
    "methods",
    "compression_factors",
    "greenctx",
    "policies",
    "engine",
    "measure",
)
MODEL_KEYS = ("path", "load_format", "batch_sizes", "methods", *ENGINE_KEYS)
DEFAULT_METHODS = ("snapkv",)
DEFAULT_FACTORS = (5.0,)
DEFAULT_SPLIT = {"compress_ratio": 0.25, "main_ratio": 0.75}


def product(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters of every cell, each baseline before what is compared with it; some come more than once.

    What a workload says for itself comes before what its model says, and that before the general settings.
    """
    engine = _section(config, "engine", ENGINE_KEYS)
    measure = _section(config, "measure", MEASURE_KEYS)
    entries = _models(config)
    workloads = _workloads(config, tuple(entries))
    for name, entry in entries.items():
        source = {
            "model": name,
            "model_path": entry.get("path"),
            "load_format": entry.get("load_format", "auto"),
        }
        own_methods = {"methods": entry["methods"]} if entry.get("methods") else {}
        of_model = {key: entry[key] for key in ENGINE_KEYS if key in entry}
        for workload, own in workloads:
            if name not in own.get("models", entries):
                continue
            axes = {**config, **own_methods, **own}
            of_workload = _section(own, "engine", ENGINE_KEYS) | _section(own, "measure", MEASURE_KEYS)
            point = engine | measure | of_model | of_workload | source | {"workload": workload}
            variants = _list(axes, "variants", VARIANTS)
            compressions, splits = list(_compressions(axes)), list(_splits(axes))
            sizes = _batch_sizes(config, name, entry, own.get("batch_sizes"))
            for size, policy in itertools.product(sizes, _list(axes, "policies", ("default",))):
                here = point | {"batch_size": size, "policy": policy}
                yield here | {"variant": "baseline"}
                for variant in variants:
                    yield from _variants(here, variant, compressions, splits)


def _variants(
    point: dict[str, Any], variant: str, compressions: list[dict[str, Any]], splits: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    if variant == "baseline":
        return
    for compression in compressions:
        for split in splits if variant in GREENCTX_VARIANTS else [{}]:
            yield {**point, **compression, **split, "variant": variant}


def memory_gib(config: Mapping[str, Any]) -> float | None:
    """The device's memory as the config gives it, to judge beforehand what can be there."""
    value = _section(config, "machine", MACHINE_KEYS).get("memory_gib")
    number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    require(value is None or number, f"machine.memory_gib is {value!r}; allowed is a positive number of GiB.")
    return value


def _models(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    section = config.get("models")
    require(isinstance(section, Mapping) and bool(section), "`models` must name at least one model.")
    entries = {str(name): ({} if entry is None else entry) for name, entry in section.items()}
    for name, entry in entries.items():
        require(isinstance(entry, Mapping), f"models.{name} must be a mapping with, say, a `path`.")
        check_keys(f"key of models.{name}", entry, MODEL_KEYS)
        models.check_source(name, entry.get("path"), entry.get("load_format", "auto"))
    return entries


def _workloads(
    config: Mapping[str, Any], model_names: tuple[str, ...]
) -> list[tuple[WorkloadConfig, dict[str, Any]]]:
    """(requests, the axes and settings that this entry has of its own)."""
    found = []
    for entry in _list(config, "workloads", None):
        require(isinstance(entry, Mapping) and "name" in entry, "each workload is a mapping with a `name`.")
        own = {key: entry[key] for key in WORKLOAD_AXES if key in entry}
        for name in own.get("models", ()):
            one_of(f"model of workload {entry['name']}", name, model_names)
        found.append((WorkloadConfig.from_dict({k: v for k, v in entry.items() if k not in own}), own))
    return found


def _batch_sizes(
    config: Mapping[str, Any], name: str, entry: Mapping[str, Any], of_workload: list[Any] | None
) -> list[int]:
    for where, sizes in (
        ("a workload's batch_sizes", of_workload),
        (f"models.{name}.batch_sizes", entry.get("batch_sizes")),
        ("batch_sizes", config.get("batch_sizes")),
        ("the model's defaults", list(models.MODELS[name].batch_sizes) if name in models.MODELS else None),
    ):
        if sizes is not None:
            require(isinstance(sizes, list) and bool(sizes), f"{where} must be a list of positive integers.")
            for size in sizes:
                positive_int(f"an entry of {where}", size)
            return list(dict.fromkeys(sizes))
    raise ConfigError(f"model {name!r} has no default batch sizes; give `batch_sizes`.")


def _compressions(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for method in _list(config, "methods", DEFAULT_METHODS):
        entry = {"name": method} if isinstance(method, str) else method
        require(
            isinstance(entry, Mapping) and "name" in entry,
            "each method is a name or {name, params, head_budgets}.",
        )
        check_keys(f"key of method {entry['name']}", entry, ("name", "params", "head_budgets"))
        for factor in _list(config, "compression_factors", DEFAULT_FACTORS):
            yield {
                "method": entry["name"],
                "compression_factor": factor,
                "method_params": dict(entry.get("params") or {}),
                "head_budgets": entry.get("head_budgets"),
            }


def _splits(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    section = _section(config, "greenctx", ("splits", "main_stream", "require", "bound"))
    for split in _list(section, "splits", (DEFAULT_SPLIT,)):
        require(isinstance(split, Mapping), "each of greenctx.splits is {compress_ratio, main_ratio}.")
        check_keys("key of greenctx.splits", split, DEFAULT_SPLIT)
        require("compress_ratio" in split, "each of greenctx.splits needs a compress_ratio.")
        compress, main = complete_split(split["compress_ratio"], split.get("main_ratio"))
        yield {
            "greenctx_compress_ratio": compress,
            "greenctx_main_ratio": main,
            "greenctx_main_stream": section.get("main_stream", False),
            "require_greenctx": section.get("require", False),
            "greenctx_bound": section.get("bound", False),
        }


def complete_split(compress: float | None, main: float | None) -> tuple[float, float]:
    """Fill in what was not said: compress 0.25, and main the rest of the device."""
    compress = 0.25 if compress is None else compress
    if main is None:
        open_interval("greenctx_compress_ratio", compress)
        main = round(1 - compress, 6)
    return compress, main


def _list(config: Mapping[str, Any], key: str, default: Iterable[Any] | None) -> list[Any]:
    value = config.get(key)
    if value is None and default is not None:
        return list(default)
    require(
        isinstance(value, list | tuple) and bool(value), f"`{key}` must be a list with at least one entry."
    )
    return list(value)


def _section(config: Mapping[str, Any], key: str, allowed: Iterable[str]) -> dict[str, Any]:
    section = config.get(key) or {}
    require(isinstance(section, Mapping), f"`{key}` must be a mapping.")
    check_keys(f"key of {key}", section, allowed)
    return dict(section)


def check_keys(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    for key in given:
        one_of(kind, key, allowed)
