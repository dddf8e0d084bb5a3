"""From a config's axes to cells. Imports no torch, and 1,000 cells take a fraction of a second.

The config, as `config/config.yaml` writes it; only `models` and `workloads` must be there:

    models:       {ALIAS: {path, load_format, batch_sizes, methods, and any key of `engine`}}
    workloads:    [{name, and any key of `WorkloadConfig`; with what these requests are combined: models (aliases),
                   batch_sizes, variants, methods, compression_factors, greenctx, policies, engine, measure}]
    variants:     [names; baseline is added by itself]
    methods:      [names, or {name, params, head_budgets}; a model's own list comes before it]
    batch_sizes:  [positive integers; a model's or a workload's own list comes before it]
    compression_factors: [numbers above 1]
    greenctx:     {splits: [{compress_ratio, main_ratio}], main_stream, require, bound}
    policies:     [which of prefill, compression and decode runs next: default, fcfs, dynamic, p1c1d8, ...]
    engine:       {dtype, kv_dtype, device, gpu_mem_util, page_size, max_model_len, max_num_batched_tokens,
                   num_pages, enable_prefix_caching, attention_backend, enforce_eager, immediate_release}
    machine:      {memory_gib}, with which cells that cannot fit are left out; {keep_process_s}, see bench/warm.py
    measure:      {repeats, warmup, seed, timeout_s}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastcache.bench.axes import MATRIX_KEYS, check_keys, memory_gib, product
from fastcache.bench.cellconfig import CellConfig
from fastcache.bench.fits import why_not
from fastcache.bench.workloadconfig import WORKLOADS, WorkloadConfig
from fastcache.config import VARIANTS, require

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
    check_keys("config key", config, (*MATRIX_KEYS, *other_keys))
    memory = memory_gib(config)
    cells: dict[str, CellConfig] = {}
    excluded: dict[str, Exclusion] = {}
    for cell in map(CellConfig.from_dict, product(config)):
        reason = impossible(cell, memory)
        if reason is None:
            cells.setdefault(cell.id, cell)
        else:
            excluded.setdefault(cell.id, Exclusion(cell, *reason))
    require(bool(cells), _nothing_left(list(excluded.values())))
    return Expansion(list(cells.values()), list(excluded.values()))


def impossible(cell: CellConfig, memory: float | None = None) -> tuple[str, str] | None:
    """(rule, reason) if the parameters alone show that the cell cannot be measured."""
    if cell.workload.output >= cell.model_len:
        return (
            "no-room-for-a-prompt",
            f"{cell.workload.output} output tokens leave no room in max_model_len {cell.model_len}",
        )
    if cell.tuning == "all" and cell.policy != "default":
        return (
            "balances-itself",
            f"variant {cell.variant!r} balances prefill and decode itself, so it takes no policy {cell.policy!r}",
        )
    if cell.workload.needs_tokenizer and cell.model_path is None:
        return (
            "text-needs-a-tokenizer",
            f"workload {cell.workload.name!r} is text, and dummy weights without a folder have no tokenizer",
        )
    too_large = why_not(cell, memory) if memory is not None else None
    return None if too_large is None else ("does-not-fit", too_large)


def _nothing_left(excluded: list[Exclusion]) -> str:
    reasons = sorted({f"{e.rule}: {e.reason}" for e in excluded})
    return "no cell of this matrix can be measured: " + "; ".join(reasons) + "."
