"""The contract of a transform: a method that writes new KV entries instead of choosing among the old ones.

A method's dataclass holds its parameters; `bind` fits it to one model, where a checkpoint is read and checked.
The engine then asks three things of the bound transform: how many entries a context shrinks to (`kept`), a `plan`
of one step's sequences, made on the host once for all layers, and `transform`, once per layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastcache.compression.base import LayerKV

Spans = Sequence[tuple[int, int]]  # (start, length) of each image of a sequence, ascending


@dataclass(frozen=True)
class ModelFit:
    """What a transform is fitted to. `cos_sin`: (max_positions, 2, d / 2) float32, the model's rotary table."""

    num_layers: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    cos_sin: Tensor
    compression_ratio: float
    images: bool = False  # the model takes images
    dummy_weights: bool = False  # the model's own weights are seeded


class Plan(Protocol):
    """Where a step's new entries come from. `tensors`: all of it that is on the device."""

    @property
    def tensors(self) -> list[Tensor]: ...


class BoundTransform(ABC):
    """A transform with its weights on the device of one engine. It has its method's name, needs and window."""

    def __init__(self, method: TransformMethod) -> None:
        self.name, self.needs, self.window = method.name, method.needs, method.window

    @abstractmethod
    def kept(self, num_tokens: int, image_spans: Spans = ()) -> int:
        """Entries per KV head that a context of `num_tokens` becomes; 0 if the method does not apply to it."""

    @abstractmethod
    def plan(self, lengths: Sequence[int], image_spans: Sequence[Spans]) -> Plan:
        """What `transform` needs to know of B sequences of these lengths, on the device."""

    @abstractmethod
    def transform(self, kv: LayerKV, plan: Plan) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hk, K, d), left-aligned, K the largest `kept`; any content behind a sequence's own."""

    @abstractmethod
    def flops(self, num_tokens: int, heads: int) -> float:
        """Of one layer's `transform` of a text context, all its KV heads; a multiply-add is two."""

    def transform_into(self, kv: LayerKV, plan: Plan, pages: tuple[Tensor, Tensor], fresh: Tensor) -> bool:
        """`transform`, stored at once; False where this device and dtype have no such way, and nothing is done.

        pages: the layer's stored keys and values, (P, Hk, page_size, d). fresh: (B, pages) int32, those that each
        sequence fills from slot 0 on.
        """
        return False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Which weights these are, for whoever reads a result."""


@dataclass(frozen=True, kw_only=True)
class TransformMethod(ABC):
    """Parameters of a transform. `window` is as in `EvictionMethod`: last queries that must share a chunk."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    window: ClassVar[int] = 0

    @abstractmethod
    def bind(self, fit: ModelFit) -> BoundTransform:
        """Errors: `CheckpointError`, `ConfigError` where the method and the model do not go together."""
