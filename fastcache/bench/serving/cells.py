"""The `serving` section of a config, and the cells it stands for. Imports no torch.

    serving:
      workload:  {context, output: lengths; arrivals: poisson | fixed | trace; trace: a CSV; dataset; images}
      runs:      [{models, policies, variants, methods, compression_factors, immediate_release, rates}]
      rates:     requests per second, where a run names none of its own
      window_s:  how long requests arrive; drain_s: how long the last ones may take after that
      slo:       {ttft_s, tpot_s}; sustained_ttft_s: the p99 TTFT up to which a rate counts as sustained
      max_num_seqs, seed, timeout_s

A length is a number, or {low, high} (uniform), or {median, sigma, low, high} (log-normal, clipped). The method `full`
is the uncompressed cache; any other is a name or {name, params}. A cell is one engine and all its rates: an engine
starts once, a row is one rate. Variants are compression-only and triad, which schedules by itself (so it goes with the
policy `default` alone) and keeps the SLO's time per token where it can; `full` has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastcache.bench import models
from fastcache.bench.axes import ENGINE_KEYS, check_keys
from fastcache.bench.cellconfig import readable_id
from fastcache.bench.serving.requests import OpenLoopConfig, positive
from fastcache.compression.registry import METHODS
from fastcache.config import StrictConfig, check_policy, one_of, ratio_of_factor, require

FULL = "full"
SERVING_KEYS = (
    "workload",
    "runs",
    "rates",
    "window_s",
    "drain_s",
    "slo",
    "sustained_ttft_s",
    "max_num_seqs",
    "seed",
    "timeout_s",
)
RUN_KEYS = ("models", "policies", "variants", "methods", "compression_factors", "immediate_release", "rates")
BASELINE, FIXED, TRIAD = "baseline", "compression-only", "triad"


@dataclass(frozen=True)
class ServingCell(StrictConfig):
    """One engine under one policy with one method, and the rates (requests per second) it is put through.

    Times are seconds. Errors: `ConfigError`, `UnknownName`.
    """

    model: str
    workload: OpenLoopConfig
    rates: tuple[float, ...]
    policy: str = "dynamic"
    variant: str | None = None
    method: str = FULL
    compression_factor: float | None = None
    method_params: Mapping[str, Any] = field(default_factory=dict)
    immediate_release: bool = True
    window_s: float = 10.0
    drain_s: float = 10.0
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.1
    sustained_ttft_s: float = 2.0
    model_path: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    device: str = "auto"
    gpu_mem_util: float = 0.9
    page_size: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    num_pages: int | None = None
    enable_prefix_caching: bool = False
    attention_backend: str = "auto"
    enforce_eager: bool = False
    seed: int = 0
    timeout_s: float = 900.0

    def __post_init__(self) -> None:
        if not isinstance(self.workload, OpenLoopConfig):
            object.__setattr__(self, "workload", OpenLoopConfig.from_dict(self.workload))
        require(bool(self.rates), "a serving cell needs `rates`: requests per second.")
        for rate in self.rates:
            positive("an entry of serving.rates", rate)
        object.__setattr__(self, "rates", tuple(sorted({float(rate) for rate in self.rates})))
        for name in ("window_s", "drain_s", "slo_ttft_s", "slo_tpot_s", "sustained_ttft_s", "timeout_s"):
            positive(f"serving: {name}", getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        check_policy(self.policy)
        models.check_source(self.model, self.model_path, self.load_format)
        self._check_variant()
        if self.method == FULL:
            none = self.compression_factor is None and not self.method_params
            require(none, "method 'full' takes no compression_factor and no params.")
            return
        one_of("serving method", self.method, (FULL, *METHODS))
        ratio_of_factor(self.compression_factor)
        object.__setattr__(self, "compression_factor", float(self.compression_factor))

    def _check_variant(self) -> None:
        allowed = (BASELINE,) if self.method == FULL else (FIXED, TRIAD)
        object.__setattr__(self, "variant", self.variant or allowed[0])
        one_of(f"serving variant with method {self.method!r}", self.variant, allowed)
        require(
            self.variant != TRIAD or self.policy == "default",
            f"variant 'triad' schedules by itself, so it takes no policy {self.policy!r}; give policies: [default].",
        )

    @property
    def scheduled_by(self) -> str:
        """What says which stage runs next: a policy, or `triad`."""
        return TRIAD if self.variant == TRIAD else self.policy

    @property
    def model_len(self) -> int:
        """Tokens per sequence that the engine is built for."""
        return self.max_model_len or self.workload.context.high + self.workload.output.high

    @property
    def setting(self) -> str:
        """Method, factor and parameters as a reader says them."""
        params = (f", {name} {_short(value)}" for name, value in self.method_params.items())
        return self.method if self.method == FULL else f"{self._method}{''.join(params)}"

    @property
    def _method(self) -> str:
        return f"{self.method} x{self.compression_factor:g}"

    @property
    def id(self) -> str:
        method = self.method if self.method == FULL else self._method.replace(" x", "-f")
        parts = ["serving", self.model, self.scheduled_by, method]
        parts += [] if self.immediate_release else ["held"]
        return readable_id(parts, self.to_dict())

    def row_id(self, rate: float) -> str:
        return f"{self.id}-r{rate:g}"


def _short(value: Any) -> str:
    """A file without its folders, which say nothing about it."""
    return str(value).rsplit("/", 1)[-1]


def expand_serving(config: Mapping[str, Any]) -> list[ServingCell]:
    """The serving cells of a whole config, each once; none without a `serving` section.

    Errors: `ConfigError`, `UnknownName`.
    """
    section = config.get("serving")
    if section is None:
        return []
    require(isinstance(section, Mapping), "`serving` must be a mapping.")
    check_keys("key of serving", section, SERVING_KEYS)
    for name in ("workload", "runs"):
        require(bool(section.get(name)), f"`serving` needs `{name}`.")
    slo = section.get("slo") or {}
    check_keys("key of serving.slo", slo, ("ttft_s", "tpot_s"))
    common = {f"slo_{name}": value for name, value in slo.items()}
    own = ("workload", "window_s", "drain_s", "sustained_ttft_s", "max_num_seqs", "seed", "timeout_s")
    common |= {name: section[name] for name in own if name in section}
    cells: dict[str, ServingCell] = {}
    for run in section["runs"]:
        require(isinstance(run, Mapping), "each of serving.runs is a mapping.")
        check_keys("key of serving.runs", run, RUN_KEYS)
        for point in _points(config, section, run):
            cell = ServingCell.from_dict(common | point)
            cells.setdefault(cell.id, cell)
    return list(cells.values())


def _points(
    config: Mapping[str, Any], section: Mapping[str, Any], run: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    engine = config.get("engine") or {}
    rates = tuple(run.get("rates") or section.get("rates") or ())
    known = {str(name): entry or {} for name, entry in config["models"].items()}
    axes = (
        run.get("models") or list(known),
        run.get("policies") or ["dynamic"],
        run.get("variants") or [None],
        run.get("methods") or [FULL],
        run.get("compression_factors") or [5],
        run.get("immediate_release") or [engine.get("immediate_release", True)],
    )
    for name, policy, variant, method, factor, release in itertools.product(*axes):
        one_of("model of serving.runs", name, tuple(known))
        entry = known[name]
        options = {key: value for key, value in {**engine, **entry}.items() if key in ENGINE_KEYS}
        source = {"model_path": entry.get("path"), "load_format": entry.get("load_format", "auto")}
        what = _method(method, factor)
        point = {
            "model": name,
            "policy": policy,
            "variant": variant,
            "immediate_release": release,
            "rates": rates,
        }
        yield {**options, **source, **point, **what}


def _method(entry: Any, factor: float) -> dict[str, Any]:
    if entry == FULL:
        return {}
    given = {"name": entry} if isinstance(entry, str) else entry
    require(
        isinstance(given, Mapping) and "name" in given,
        "each of serving.runs.methods is a name or {name, params}.",
    )
    check_keys(f"key of method {given['name']}", given, ("name", "params"))
    return {
        "method": given["name"],
        "compression_factor": factor,
        "method_params": dict(given.get("params") or {}),
    }
