"""What one cell is: every parameter that decides its numbers, frozen, with an id made of all of them.

Imports no torch: the workflow builds its graph from these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from fastcache.bench import models
from fastcache.bench.workloadconfig import WorkloadConfig
from fastcache.compression.registry import METHODS
from fastcache.config import (
    DEVICES,
    DTYPES,
    LOAD_FORMATS,
    VARIANTS,
    PartitionConfig,
    StrictConfig,
    check_kv_dtype,
    check_policy,
    one_of,
    open_interval,
    positive_int,
    ratio_of_factor,
    require,
)
from fastcache.errors import ConfigError

MAX_MODEL_LEN = 4096  # tokens per sequence where nothing else is said, as in the guide
GREENCTX_VARIANTS = ("greenctx-only", "auto-tune+greenctx", "triad")


def readable_id(parts: Sequence[str], content: Mapping[str, Any]) -> str:
    """`parts` as a file may be called, unique through a hash of the whole content; nothing is ever parsed out of it."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
    return "".join(ch if ch.isalnum() or ch in "-." else "-" for ch in "-".join((*parts, digest)))


@dataclass(frozen=True)
class CellConfig(StrictConfig):
    """One point of the matrix. Sizes are tokens, pages and seconds as named; None lets the engine choose.

    A field that does not apply to the variant is None (baseline: no method, no ratios), so equal content is
    an equal id. Errors: `ConfigError`, `UnknownName`.
    """

    model: str
    workload: WorkloadConfig
    batch_size: int
    variant: str
    model_path: str | None = None
    load_format: str = "auto"
    method: str | None = None
    compression_factor: float | None = None
    method_params: Mapping[str, Any] = field(default_factory=dict)
    head_budgets: str | None = None
    greenctx_compress_ratio: float | None = None
    greenctx_main_ratio: float | None = None
    greenctx_main_stream: bool = False
    greenctx_bound: bool = False
    require_greenctx: bool = False
    policy: str = "default"
    immediate_release: bool = True
    dtype: str = "auto"
    kv_dtype: str = "auto"
    device: str = "auto"
    gpu_mem_util: float = 0.9
    page_size: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    num_pages: int | None = None
    enable_prefix_caching: bool = False
    attention_backend: str = "auto"
    enforce_eager: bool = False
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if isinstance(self.workload, Mapping):
            object.__setattr__(self, "workload", WorkloadConfig.from_dict(self.workload))
        require(isinstance(self.workload, WorkloadConfig), "workload must be a mapping with a `name`.")
        for name in ("compression_factor", "timeout_s"):  # 5 and 5.0 are one cell, so they need one spelling
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))
        one_of("variant", self.variant, VARIANTS)
        one_of("load_format", self.load_format, LOAD_FORMATS)
        one_of("dtype", self.dtype, ("auto", *DTYPES))
        check_kv_dtype(self.kv_dtype)
        one_of("device", str(self.device).split(":")[0], DEVICES)
        for name in ("batch_size", "page_size", "repeats"):
            positive_int(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "num_pages"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        for name in ("warmup", "seed"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0,
                f"{name} is {value!r}; allowed is 0 or a positive integer.",
            )
        require(
            isinstance(self.timeout_s, float) and self.timeout_s > 0,
            f"timeout_s is {self.timeout_s!r}; allowed is a positive number of seconds.",
        )
        open_interval("gpu_mem_util", self.gpu_mem_util)
        check_policy(self.policy)
        models.check_source(self.model, self.model_path, self.load_format)
        self._check_compression()
        self._check_partition()

    def _check_compression(self) -> None:
        if self.variant == "baseline":
            require(
                self.method is None
                and self.compression_factor is None
                and not self.method_params
                and self.head_budgets is None,
                "variant 'baseline' takes no method, compression_factor, method_params or head_budgets.",
            )
            return
        require(self.method is not None, f"variant {self.variant!r} needs a `method`.")
        one_of("method", self.method, tuple(METHODS))
        ratio_of_factor(self.compression_factor)

    def _check_partition(self) -> None:
        ratios = (self.greenctx_compress_ratio, self.greenctx_main_ratio)
        if self.variant not in GREENCTX_VARIANTS:
            require(
                ratios == (None, None)
                and not (self.greenctx_main_stream or self.require_greenctx or self.greenctx_bound),
                f"variant {self.variant!r} uses no green contexts, so it takes no greenctx setting.",
            )
            return
        if None in ratios:
            raise ConfigError(
                f"variant {self.variant!r} needs greenctx_compress_ratio and greenctx_main_ratio."
            )
        PartitionConfig(
            compress_ratio=ratios[0],
            main_ratio=ratios[1],
            main_stream=self.greenctx_main_stream,
            bound=self.greenctx_bound,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        require(isinstance(values, Mapping), "a cell is a mapping of parameters.")
        for name in ("model", "workload", "batch_size", "variant"):
            require(name in values, f"a cell needs `{name}`.")
        return super().from_dict(values)

    @property
    def id(self) -> str:
        parts = [
            self.model,
            self.workload.name,
            f"c{self.workload.context}",
            f"o{self.workload.output}",
            f"b{self.batch_size}",
            self.variant,
        ]
        if self.workload.images:
            parts.append(f"i{self.workload.images}")
        if self.method is not None:
            parts += [self.method, f"f{self.compression_factor:g}"]
        if self.head_budgets is not None:
            parts.append("heads")
        if self.kv_dtype != "auto":
            parts.append(self.kv_dtype)
        if self.policy != "default":
            parts.append(self.policy)
        if not self.immediate_release:
            parts.append("held")
        if self.num_pages is not None:
            parts.append(f"p{self.num_pages}")
        if self.enable_prefix_caching:
            parts.append("prefix")
        return readable_id(parts, self.to_dict())

    @property
    def model_len(self) -> int:
        """Tokens per sequence, prompt and output together, that the engine is built for."""
        if self.max_model_len is not None:
            return self.max_model_len
        return min(MAX_MODEL_LEN, self.workload.context + self.workload.output)

    @property
    def compressed(self) -> bool:
        return self.variant != "baseline"

    @property
    def tuning(self) -> str:
        """What the engine decides from measurement (`EngineConfig.tuning`)."""
        return {"auto-tune+greenctx": "compression", "triad": "all"}.get(self.variant, "off")

    @property
    def greenctx(self) -> bool:
        return self.variant in GREENCTX_VARIANTS

    def baseline(self) -> CellConfig:
        """The cell this one is compared with: same model, requests and engine, nothing switched on."""
        return dataclasses.replace(
            self,
            variant="baseline",
            method=None,
            compression_factor=None,
            method_params={},
            head_budgets=None,
            greenctx_compress_ratio=None,
            greenctx_main_ratio=None,
            greenctx_main_stream=False,
            greenctx_bound=False,
            require_greenctx=False,
        )

    @property
    def baseline_id(self) -> str:
        return self.baseline().id
