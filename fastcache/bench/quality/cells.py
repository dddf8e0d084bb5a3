"""The `quality` section of a config, and the cells it stands for. Imports no torch.

    quality:
      models:    [aliases of `models`; default, all that have a folder]
      methods:   [names, or {name, params, head_budgets, kv_dtype, query_aware, ratios}]
      ratios:    [shares of the KV entries that are removed]
      tasks:     [{name, context, output, samples, pictures}]
      text:      a UTF-8 file, default the prose that ships with Python
      seed, timeout_s

Guard rows come by themselves: the full cache, the full cache in fp8, random eviction at every ratio, no context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from fastcache.bench import models
from fastcache.bench.axes import ENGINE_KEYS, check_keys
from fastcache.bench.cellconfig import readable_id
from fastcache.compression.registry import METHODS
from fastcache.config import StrictConfig, check_kv_dtype, one_of, open_interval, positive_int, require

FULL, NO_CONTEXT, RANDOM = "full", "no_context", "random"
GUARDS = (FULL, NO_CONTEXT, RANDOM)
SHAPES = "shapes"
RETRIEVAL = ("needles4", "needle", "kv_lookup")
TASKS = ("continuation", "greedy", *RETRIEVAL, SHAPES)
QUALITY_KEYS = ("models", "methods", "ratios", "tasks", "text", "seed", "timeout_s")
METHOD_KEYS = ("name", "params", "head_budgets", "kv_dtype", "query_aware", "ratios")
DEFAULT_RATIOS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class TaskConfig(StrictConfig):
    """`samples` contexts of `context` tokens. `output`: tokens scored after them (continuation), or generated (greedy);
    retrieval and shapes have answers of their own length and take none. `pictures`: of each context of shapes, whose
    tokens may be fewer than `context` and not more."""

    name: str
    context: int = 1024
    output: int | None = None
    samples: int = 16
    pictures: int | None = None

    def __post_init__(self) -> None:
        one_of("quality task", self.name, TASKS)
        positive_int(f"task {self.name}: context", self.context)
        positive_int(f"task {self.name}: samples", self.samples)
        if self.name == SHAPES:
            object.__setattr__(self, "pictures", 1 if self.pictures is None else self.pictures)
            positive_int("task shapes: pictures", self.pictures)
        else:
            require(self.pictures is None, f"task {self.name!r} takes no `pictures`.")
        if self.name in (*RETRIEVAL, SHAPES):
            require(
                self.output is None,
                f"task {self.name!r} takes no `output`: its answers have their own length.",
            )
        elif self.output is None:
            object.__setattr__(self, "output", 96)
        else:
            positive_int(f"task {self.name}: output", self.output)


@dataclass(frozen=True)
class QualityCell(StrictConfig):
    """One method at one ratio on one model, and the tasks it is put through. The uncompressed cache of the same model
    answers the same tasks in the same process, so every comparison is paired.

    method: a name of the registry, or "full" and "no_context", which have no ratio. query_aware: in retrieval tasks
    the question is part of what is compressed. Errors: `ConfigError`, `UnknownName`.
    """

    model: str
    method: str
    tasks: tuple[TaskConfig, ...]
    model_path: str | None = None
    compression_ratio: float | None = None
    method_params: Mapping[str, Any] = field(default_factory=dict)
    head_budgets: str | None = None
    query_aware: bool = False
    kv_dtype: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    page_size: int = 16
    gpu_mem_util: float = 0.9
    attention_backend: str = "auto"
    max_num_batched_tokens: int | None = None
    num_pages: int | None = None
    enforce_eager: bool = False
    text: str | None = None
    seed: int = 0
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        tasks = [t if isinstance(t, TaskConfig) else TaskConfig.from_dict(t) for t in self.tasks]
        object.__setattr__(self, "tasks", tuple(tasks))
        object.__setattr__(self, "timeout_s", float(self.timeout_s))
        require(bool(tasks), "quality.tasks names no task.")
        names = [task.name for task in tasks]
        require(
            len(set(names)) == len(names), "quality.tasks names a task twice; a row has one result for each."
        )
        one_of("compression method", self.method, (FULL, NO_CONTEXT, *METHODS))
        check_kv_dtype(self.kv_dtype)
        models.check_source(self.model, self.model_path, "auto")
        if self.method in (FULL, NO_CONTEXT):
            plain = self.compression_ratio is None and not self.method_params and self.head_budgets is None
            require(
                plain and not self.query_aware,
                f"{self.method!r} is a guard row: it takes no ratio and no params.",
            )
        else:
            open_interval("an entry of quality.ratios", self.compression_ratio)

    @property
    def guard(self) -> bool:
        """There to be compared with, not to be chosen."""
        return self.method in GUARDS

    @property
    def label(self) -> str:
        """The method with what was done to it beside the ratio, as a reader says it."""
        parts = [self.method.replace("_", " ") if self.method == NO_CONTEXT else self.method]
        for name, value in sorted(self.method_params.items()):
            parts.append(PurePath(str(value)).stem if name == "checkpoint" else f"{name}={value}")
        if self.head_budgets:
            shared = self.head_budgets in ("adakv", "global")
            parts.append(f"{self.head_budgets if shared else 'head'} budgets")
        parts += [self.kv_dtype] if self.kv_dtype != "auto" else []
        parts += ["query-aware"] if self.query_aware else []
        return " ".join(parts)

    @property
    def id(self) -> str:
        ratio = [] if self.compression_ratio is None else [f"r{self.compression_ratio:g}"]
        return readable_id(["quality", self.model, self.label, *ratio], self.to_dict())


def expand_quality(config: Mapping[str, Any]) -> list[QualityCell]:
    """The quality cells of a whole config, each once, guard rows first; none without a `quality` section.

    Errors: `ConfigError`, `UnknownName`.
    """
    section = config.get("quality")
    if section is None:
        return []
    require(isinstance(section, Mapping), "`quality` must be a mapping.")
    check_keys("key of quality", section, QUALITY_KEYS)
    require(bool(section.get("tasks")), "`quality.tasks` must be a list with at least one task.")
    cells: dict[str, QualityCell] = {}
    for common in _models(config, section):
        for point in _points(section):
            cell = QualityCell.from_dict({**common, **point})
            cells.setdefault(cell.id, cell)
    return list(cells.values())


def _models(config: Mapping[str, Any], section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    known = {str(name): entry or {} for name, entry in config["models"].items()}
    chosen = section.get("models") or [name for name, entry in known.items() if entry.get("path")]
    require(
        bool(chosen), "`quality` needs a model with a `path`: dummy weights know nothing that could be lost."
    )
    fields = {f.name for f in dataclasses.fields(QualityCell)}
    engine = config.get("engine") or {}
    for name in chosen:
        one_of("model of quality.models", name, tuple(known))
        entry = known[name]
        require(
            bool(entry.get("path")), f"quality.models names {name!r}, which has no `path`, so no weights."
        )
        settings = {k: v for k, v in {**engine, **entry}.items() if k in ENGINE_KEYS and k in fields}
        settings.pop(
            "kv_dtype", None
        )  # a quality cell compares with the model's own type, and names fp8 itself
        shared = {k: section[k] for k in ("text", "seed", "timeout_s") if section.get(k) is not None}
        yield {"model": name, "model_path": entry["path"], "tasks": section["tasks"], **settings, **shared}


def _points(section: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"method": FULL}
    yield {"method": FULL, "kv_dtype": "fp8"}
    yield {"method": NO_CONTEXT}
    ratios = section.get("ratios") or DEFAULT_RATIOS
    for ratio in ratios:
        yield {"method": RANDOM, "compression_ratio": ratio}
        for method in section.get("methods") or ():
            entry = {"name": method} if isinstance(method, str) else dict(method)
            check_keys("key of quality.methods", entry, METHOD_KEYS)
            require("name" in entry, "each of quality.methods is a name or a mapping with a `name`.")
            own = entry.pop("ratios", None) or ratios
            require(
                set(own) <= set(ratios),
                f"ratios of quality method {entry['name']!r} are {own}; allowed are those of quality.ratios, "
                f"{list(ratios)}.",
            )
            if ratio not in own:
                continue
            point = {"method": entry.pop("name"), "compression_ratio": ratio}
            point["method_params"] = dict(entry.pop("params", None) or {})
            yield point | entry
