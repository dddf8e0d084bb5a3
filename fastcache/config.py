"""Frozen configurations. Unknown keys are errors; derived values are properties and are never stored.

`from_dict` is the one way in from YAML, JSON and keyword arguments, so every typo meets the same sentence.
This module imports no torch: it is used while the workflow builds its graph.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fastcache.errors import ConfigError, UnknownName

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "fp8")
LOAD_FORMATS = ("auto", "dummy")
DEVICES = ("auto", "cpu", "cuda")
# Who runs next (see engine/stages.py): a name, or pXcYdZ with fixed prefill, compression and decode batches.
POLICIES = ("default", "fcfs", "dynamic")
STATIC_POLICY = r"p([1-9]\d*)c([1-9]\d*)d([1-9]\d*)"
# Which decisions the engine takes from what it measured: none, those about compression, also the balance of
# prefill and decode.
TUNING = ("off", "compression", "all")
VARIANTS = ("baseline", "compression-only", "greenctx-only", "auto-tune+greenctx", "triad")


class StrictConfig:
    """Mixin for frozen dataclasses: build from a mapping, refuse unknown keys by name."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for key in values:
            if key not in known:
                raise UnknownName(f"{cls.__name__} key", key, known)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def one_of(kind: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnknownName(kind, value, allowed)


def check_kv_dtype(value: str) -> None:
    """Errors: `ConfigError` for 4 bits, which cannot be offered, `UnknownName` for what does not exist."""
    require(
        value not in ("int4", "fp4", "nvfp4"),
        f"kv_dtype is {value!r}; allowed: {', '.join(KV_DTYPES)}. No attention kernel here reads keys and values of 4 "
        "bits, and unpacking them before each step would move more bytes than it saves. For a quarter of the bytes "
        "take fp8 and a compression method at factor 2.",
    )
    one_of("kv_dtype", value, KV_DTYPES)


def open_interval(name: str, value: float) -> None:
    require(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1,
        f"{name} is {value!r}; allowed is a number strictly between 0 and 1.",
    )


def positive_int(name: str, value: int) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{name} is {value!r}; allowed is a positive integer.",
    )


def check_policy(value: str) -> None:
    if not (isinstance(value, str) and re.fullmatch(STATIC_POLICY, value)):
        one_of("policy", value, (*POLICIES, "p1c1d8 (fixed batches, any numbers)"))


@dataclass(frozen=True)
class SamplingParams(StrictConfig):
    """How the next token is chosen, and when to stop.

    temperature 0 is greedy. `top_k` 0 and `top_p` 1 are off. `seed` makes one request's draws independent of
    the batch it runs in.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature is {self.temperature!r}; allowed is 0 (greedy) or a positive number.",
        )
        require(
            isinstance(self.top_k, int) and self.top_k >= 0,
            f"top_k is {self.top_k!r}; allowed is 0 (off) or a positive integer.",
        )
        require(0 < self.top_p <= 1, f"top_p is {self.top_p!r}; allowed is a number in (0, 1].")
        positive_int("max_tokens", self.max_tokens)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class CompressionConfig(StrictConfig):
    """Which method shrinks the KV cache, and by how much.

    `compression_ratio` is the fraction of KV entries REMOVED, as in kvpress: 0.8 keeps a fifth.
    `params` are the method's own hyper-parameters; names are checked against the method when it is built.
    `head_budgets` is a file of `fastcache calibrate`: each (layer, KV head) gets its own share of the same total.
    "adakv" lets the heads of a layer share by their scores, "global" (for kvzip) all heads of all layers.
    """

    method: str
    compression_ratio: float = 0.8
    params: Mapping[str, Any] = field(default_factory=dict)
    head_budgets: str | None = None

    def __post_init__(self) -> None:
        open_interval("compression_ratio", self.compression_ratio)
        require(
            self.head_budgets is None or isinstance(self.head_budgets, str),
            f"head_budgets is {self.head_budgets!r}; allowed is a file of `fastcache calibrate`, 'adakv' or 'global'.",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Accepts `compression_factor` (f keeps 1/f) in place of `compression_ratio`, never both."""
        values = dict(values)
        if "compression_factor" in values:
            require(
                "compression_ratio" not in values,
                "compression_factor and compression_ratio were both given; give one "
                "(factor f is the ratio 1 - 1/f).",
            )
            values["compression_ratio"] = ratio_of_factor(values.pop("compression_factor"))
        require("method" in values, "compression needs a `method`.")
        return super().from_dict(values)

    @property
    def compression_factor(self) -> float:
        return 1 / (1 - self.compression_ratio)


def ratio_of_factor(factor: float) -> float:
    """Factor f keeps one entry in f, so the removed fraction is 1 - 1/f. Errors: f <= 1 or not finite."""
    require(
        isinstance(factor, int | float) and math.isfinite(factor) and factor > 1,
        f"compression_factor is {factor!r}; allowed is a number above 1 (5 keeps one entry in five). "
        "For no compression use the variant 'baseline'.",
    )
    return 1 - 1 / factor


@dataclass(frozen=True)
class PartitionConfig(StrictConfig):
    """Which share of the SMs each side asks for (green contexts). Ratios are of the whole device.

    `bound`: the ratios are the most that tuning may grant, rather than what it must.
    """

    enabled: bool = False
    compress_ratio: float = 0.25
    main_ratio: float = 0.75
    main_stream: bool = False
    require: bool = False
    bound: bool = False

    def __post_init__(self) -> None:
        open_interval("greenctx_compress_ratio", self.compress_ratio)
        open_interval("greenctx_main_ratio", self.main_ratio)
        require(
            self.compress_ratio + self.main_ratio <= 1 + 1e-9,
            f"greenctx_compress_ratio {self.compress_ratio} and greenctx_main_ratio {self.main_ratio} sum to "
            f"{self.compress_ratio + self.main_ratio:.3f}; together they may use at most 1 (the whole GPU).",
        )
        both = "greenctx bound and main_stream are both on, but main_stream takes its SMs for good: leave one out."
        require(not (self.bound and self.main_stream), both)


@dataclass(frozen=True)
class EngineConfig(StrictConfig):
    """Everything `LLM` needs besides the prompts. Sizes are in tokens, pages and bytes as named.

    `num_pages` None sizes the KV pool by itself: from `gpu_memory_utilization` on CUDA, and on the CPU for
    `max_num_seqs` sequences of `max_model_len`, bounded by a share of the free memory.
    `max_num_batched_tokens` None picks what saturates the device's matrix units.
    `kv_dtype` is what the KV pool stores: "auto" the model's type, "fp8" e4m3 without a scale, half of bfloat16.
    `policy` says which of prefill, compression and decode runs next (engine/stages.py); `tuning` which decisions
    are taken from measurement (engine/policy.py). `immediate_release` frees a compressed sequence's old pages at
    once; without it they stay until the request ends. `max_waiting` bounds the queue of requests: one more is
    refused. `costs` names a file of `fastcache cost`, from this device and model, which tuning starts from.
    `tpot_bound_s`: with tuning "all", seconds between two tokens of a request that no prefill should exceed;
    None: only throughput counts.
    """

    model: str
    dtype: str = "auto"
    kv_dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    page_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = False
    attention_backend: str = "auto"
    enforce_eager: bool = False
    seed: int = 0
    policy: str = "default"
    tuning: str = "off"
    costs: str | None = None
    tpot_bound_s: float | None = None
    immediate_release: bool = True
    max_waiting: int | None = None
    compression: CompressionConfig | None = None
    partition: PartitionConfig = PartitionConfig()

    def __post_init__(self) -> None:
        if isinstance(self.compression, Mapping):
            object.__setattr__(self, "compression", CompressionConfig.from_dict(self.compression))
        if isinstance(self.partition, Mapping):
            object.__setattr__(self, "partition", PartitionConfig.from_dict(self.partition))
        one_of("dtype", self.dtype, ("auto", *DTYPES))
        check_kv_dtype(self.kv_dtype)
        one_of("device", self.device.split(":")[0], DEVICES)
        one_of("load_format", self.load_format, LOAD_FORMATS)
        for name in ("page_size", "max_num_seqs"):
            positive_int(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "num_pages", "max_waiting"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        check_policy(self.policy)
        one_of("tuning", self.tuning, TUNING)
        require(
            self.tuning != "all" or self.policy == "default",
            f"tuning 'all' balances prefill and decode itself, so it takes no policy {self.policy!r}; "
            "leave policy at 'default', or use tuning 'compression'.",
        )
        self._check_tuning()
        open_interval("gpu_memory_utilization", self.gpu_memory_utilization)

    def _check_tuning(self) -> None:
        bound = self.tpot_bound_s
        number = isinstance(bound, int | float) and not isinstance(bound, bool) and 0 < bound < float("inf")
        require(
            bound is None or number,
            f"tpot_bound_s is {bound!r}; allowed is a positive number of seconds, or None.",
        )
        require(
            bound is None or self.tuning == "all",
            f"tpot_bound_s is kept by tuning 'all', and tuning is {self.tuning!r}; set that, or leave the bound out.",
        )
        require(
            self.costs is None or (self.tuning != "off" and self.compression is not None),
            "costs are what tuning starts from; give `compression` and set tuning, or leave costs out.",
        )
