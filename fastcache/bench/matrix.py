"""From a config's axes to cells. Imports no torch, and 1,000 cells take a fraction of a second.

The config, as `config/config.yaml` writes it; only `models` and `workloads` must be there:

    models:       {ALIAS: {path, load_format, batch_sizes, methods, and any key of `engine`}}
    workloads:    [{name, batch_sizes, and any key of `WorkloadConfig`}]
    variants:     [names; baseline is added by itself]
    methods:      [names, or {name, params, head_budgets}; a model's own list comes before it]
    batch_sizes:  [positive integers; a model's or a workload's own list comes before it]
    compression_factors: [numbers above 1]
    greenctx:     {splits: [{compress_ratio, main_ratio}], main_stream, require}
    engine:       {dtype, kv_dtype, device, gpu_mem_util, page_size, max_model_len, max_num_batched_tokens,
                   num_pages, enable_prefix_caching, attention_backend, enforce_eager}
    measure:      {repeats, warmup, seed, timeout_s}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastcache.bench import models
from fastcache.bench.cellconfig import GREENCTX_VARIANTS, WORKLOADS, CellConfig, WorkloadConfig
from fastcache.config import VARIANTS, one_of, open_interval, positive_int, require
from fastcache.errors import ConfigError, UnknownName

__all__ = [
    "MATRIX_KEYS",
    "VARIANTS",
    "WORKLOADS",
    "CellConfig",
    "Exclusion",
    "Expansion",
    "WorkloadConfig",
    "expand",
]

MATRIX_KEYS = (
    "models",
    "workloads",
    "variants",
    "methods",
    "batch_sizes",
    "compression_factors",
    "greenctx",
    "engine",
    "measure",
)
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
)
MEASURE_KEYS = ("repeats", "warmup", "seed", "timeout_s")
MODEL_KEYS = ("path", "load_format", "batch_sizes", "methods", *ENGINE_KEYS)
DEFAULT_METHODS = ("snapkv",)
DEFAULT_FACTORS = (5.0,)
DEFAULT_SPLIT = {"compress_ratio": 0.25, "main_ratio": 0.75}


@dataclass(frozen=True)
class Exclusion:
    """A cell that is not measured: the named rule that says so, and its reason."""

    cell: CellConfig
    rule: str
    reason: str


@dataclass(frozen=True)
class Expansion:
    cells: list[CellConfig]
    excluded: list[Exclusion]


def expand(config: Mapping[str, Any], other_keys: Iterable[str] = ()) -> Expansion:
    """Every cell of the config once, each baseline before what is compared with it.

    `other_keys` are top-level keys that belong to someone else (the workflow's own sections); any further
    key is an error that names its nearest neighbour. Errors: `ConfigError`, `UnknownName`.
    """
    require(isinstance(config, Mapping), "the matrix config must be a mapping.")
    _check_keys("config key", config, (*MATRIX_KEYS, *other_keys))
    cells: dict[str, CellConfig] = {}
    excluded: dict[str, Exclusion] = {}
    for cell in _product(config):
        reason = impossible(cell)
        if reason is None:
            cells.setdefault(cell.id, cell)
        else:
            excluded.setdefault(cell.id, Exclusion(cell, *reason))
    require(bool(cells), _nothing_left(list(excluded.values())))
    return Expansion(list(cells.values()), list(excluded.values()))


def impossible(cell: CellConfig) -> tuple[str, str] | None:
    """(rule, reason) if the parameters alone show that the cell cannot be measured."""
    if cell.workload.output >= cell.model_len:
        return (
            "no-room-for-a-prompt",
            f"{cell.workload.output} output tokens leave no room in max_model_len {cell.model_len}",
        )
    if cell.workload.needs_tokenizer and cell.model_path is None:
        return (
            "text-needs-a-tokenizer",
            f"workload {cell.workload.name!r} is text, and dummy weights without a folder have no tokenizer",
        )
    return None


def _product(config: Mapping[str, Any]) -> Iterator[CellConfig]:
    engine = _section(config, "engine", ENGINE_KEYS)
    measure = _section(config, "measure", MEASURE_KEYS)
    variants = _names("variant", _list(config, "variants", VARIANTS), VARIANTS)
    splits = list(_splits(config))
    workloads = _workloads(config)
    for name, entry in _models(config).items():
        common = {**engine, **measure, **{k: entry[k] for k in ENGINE_KEYS if k in entry}}
        common |= {
            "model": name,
            "model_path": entry.get("path"),
            "load_format": entry.get("load_format", "auto"),
        }
        compressions = list(_compressions(config, entry))
        for workload, own_sizes in workloads:
            for size in _batch_sizes(config, name, entry, own_sizes):
                point = {**common, "workload": workload, "batch_size": size}
                yield CellConfig.from_dict({**point, "variant": "baseline"})
                for variant in variants:
                    yield from _variant_cells(point, variant, compressions, splits)


def _variant_cells(
    point: dict[str, Any], variant: str, compressions: list[dict[str, Any]], splits: list[dict[str, Any]]
) -> Iterator[CellConfig]:
    if variant == "baseline":
        return
    for compression in compressions:
        for split in splits if variant in GREENCTX_VARIANTS else [{}]:
            yield CellConfig.from_dict({**point, **compression, **split, "variant": variant})


def _models(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    section = config.get("models")
    require(isinstance(section, Mapping) and bool(section), "`models` must name at least one model.")
    entries = {str(name): ({} if entry is None else entry) for name, entry in section.items()}
    for name, entry in entries.items():
        require(isinstance(entry, Mapping), f"models.{name} must be a mapping with, say, a `path`.")
        _check_keys(f"key of models.{name}", entry, MODEL_KEYS)
        models.check_source(name, entry.get("path"), entry.get("load_format", "auto"))
    return entries


def _workloads(config: Mapping[str, Any]) -> list[tuple[WorkloadConfig, list[Any] | None]]:
    found = []
    for entry in _list(config, "workloads", None):
        require(isinstance(entry, Mapping) and "name" in entry, "each workload is a mapping with a `name`.")
        values = dict(entry)
        sizes = values.pop("batch_sizes", None)
        found.append((WorkloadConfig.from_dict(values), sizes))
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


def _compressions(config: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for method in _list(model if model.get("methods") else config, "methods", DEFAULT_METHODS):
        entry = {"name": method} if isinstance(method, str) else method
        require(
            isinstance(entry, Mapping) and "name" in entry,
            "each method is a name or {name, params, head_budgets}.",
        )
        _check_keys(f"key of method {entry['name']}", entry, ("name", "params", "head_budgets"))
        for factor in _list(config, "compression_factors", DEFAULT_FACTORS):
            yield {
                "method": entry["name"],
                "compression_factor": factor,
                "method_params": dict(entry.get("params") or {}),
                "head_budgets": entry.get("head_budgets"),
            }


def _splits(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    section = _section(config, "greenctx", ("splits", "main_stream", "require"))
    for split in _list(section, "splits", (DEFAULT_SPLIT,)):
        require(isinstance(split, Mapping), "each of greenctx.splits is {compress_ratio, main_ratio}.")
        _check_keys("key of greenctx.splits", split, DEFAULT_SPLIT)
        require("compress_ratio" in split, "each of greenctx.splits needs a compress_ratio.")
        compress, main = complete_split(split["compress_ratio"], split.get("main_ratio"))
        yield {
            "greenctx_compress_ratio": compress,
            "greenctx_main_ratio": main,
            "greenctx_main_stream": section.get("main_stream", False),
            "require_greenctx": section.get("require", False),
        }


def complete_split(compress: float | None, main: float | None) -> tuple[float, float]:
    """Fill in what was not said: compress 0.25, and main the rest of the device."""
    compress = 0.25 if compress is None else compress
    if main is None:
        open_interval("greenctx_compress_ratio", compress)
        main = round(1 - compress, 6)
    return compress, main


def _names(kind: str, given: Iterable[str], allowed: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(given))
    for name in names:
        one_of(kind, name, allowed)
    return names


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
    _check_keys(f"key of {key}", section, allowed)
    return dict(section)


def _check_keys(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    for key in given:
        if key not in allowed:
            raise UnknownName(kind, key, allowed)


def _nothing_left(excluded: list[Exclusion]) -> str:
    reasons = sorted({f"{e.rule}: {e.reason}" for e in excluded})
    return "no cell of this matrix can be measured: " + "; ".join(reasons) + "."
