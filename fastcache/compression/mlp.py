"""MLP: k neighbouring entries become one, by trained networks; FastCache's own compressor."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastcache.compression.base import LayerKV
from fastcache.compression.merge import MergeLayout, MergePlan, Net, make_plan, merge_layer
from fastcache.compression.merge_checkpoint import (
    MergeCheckpoint,
    check_shapes,
    dummy_checkpoint,
    read_checkpoint,
)
from fastcache.compression.tensor_file import DUMMY, check_dummy, identity
from fastcache.compression.transform import BoundTransform, ModelFit, Spans, TransformMethod
from fastcache.config import require
from fastcache.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MLP(TransformMethod):
    """Each run of k = factor text entries, or of k image entries, becomes one; what fills no group stays.

    Zhu et al., "FastCache: Optimizing Multimodal LLM Serving through Lightweight KV-Cache Compression Framework",
    arXiv:2503.08461. Separate networks for keys and values of text and images, in every layer, shared by its heads.

    checkpoint: a file of `fastcache train-compressor`, or a `.pth` in the original's layout. The file says which
        first and last entries are never merged and how keys are turned (`merge.MergeLayout`); the original's says
        nothing, and is read as its code was: all entries, keys as stored. A merged key stands at the position of
        its group's last entry. There is no default, and no random weights but those that "dummy" asks for, which only
        a model with dummy weights takes.
    """

    name: ClassVar[str] = "mlp"

    checkpoint: str | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.checkpoint, str) and self.checkpoint != "",
            f"checkpoint is {self.checkpoint!r}; method 'mlp' needs the path of a compressor checkpoint "
            "(`fastcache train-compressor` makes one).",
        )

    def bind(self, fit: ModelFit) -> BoundMLP:
        factor = round(1 / (1 - fit.compression_ratio))
        if abs(factor * (1 - fit.compression_ratio) - 1) > 1e-6:
            raise ConfigError(
                f"compression_ratio is {fit.compression_ratio:g}; method 'mlp' merges whole groups, so allowed is "
                "1 - 1/k for a whole k (compression_factor 5 is ratio 0.8)."
            )
        checkpoint = self._read(fit, factor)
        layout = checkpoint.layout or MergeLayout(factor)
        if layout.factor != factor:
            raise CheckpointError(
                f"{checkpoint.path} merges groups of {layout.factor}; compression_factor is {factor}. Set it to "
                f"{layout.factor}, or train for {factor}."
            )
        check_shapes(checkpoint, fit.num_layers, fit.head_dim, factor)
        if fit.images and "ik" not in checkpoint.kinds:
            raise CheckpointError(
                f"{checkpoint.path} has no networks for images (ik, iv), and the model takes them."
            )
        if checkpoint.unused:
            log.info(
                "%s: %d tensors (%s, ...) are unused",
                checkpoint.path,
                len(checkpoint.unused),
                checkpoint.unused[0],
            )
        return BoundMLP(self, checkpoint, layout, fit)

    def _read(self, fit: ModelFit, factor: int) -> MergeCheckpoint:
        if self.checkpoint != DUMMY:
            return read_checkpoint(str(self.checkpoint))
        check_dummy(fit.dummy_weights)
        return dummy_checkpoint(fit.num_layers, fit.head_dim, factor, fit.images)


class BoundMLP(BoundTransform):
    """The networks of one model on its device, in its dtype."""

    def __init__(self, method: MLP, checkpoint: MergeCheckpoint, layout: MergeLayout, fit: ModelFit) -> None:
        super().__init__(method)
        self.layout, self._fit = layout, fit
        self._nets = [checkpoint.nets(layer, fit.dtype, fit.device) for layer in range(fit.num_layers)]
        self._checkpoint = checkpoint
        self._into_pages = _kernel(self._nets[0], fit)
        self._angles = fit.cos_sin.half() if self._into_pages is not None else None

    def kept(self, num_tokens: int, image_spans: Spans = ()) -> int:
        return self.layout.kept(num_tokens, image_spans)

    def plan(self, lengths: Sequence[int], image_spans: Sequence[Spans]) -> MergePlan:
        return make_plan(lengths, image_spans, self.layout, self._fit.device)

    def transform(self, kv: LayerKV, plan: MergePlan) -> tuple[Tensor, Tensor]:
        return merge_layer(kv.keys, kv.values, plan, self._nets[kv.layer], self.layout, self._fit.cos_sin)

    def flops(self, num_tokens: int, heads: int) -> float:
        factor, kept = self.layout.factor, self.kept(num_tokens)
        groups = (num_tokens - kept) // (factor - 1) if kept else 0
        weights = sum(part.numel() for kind in ("tk", "tv") for part in self._nets[0][kind][::2])
        return 2.0 * weights * heads * groups

    def transform_into(
        self, kv: LayerKV, plan: MergePlan, pages: tuple[Tensor, Tensor], fresh: Tensor
    ) -> bool:
        if self._into_pages is None:
            return False
        nets = self._nets[kv.layer]
        self._into_pages(kv.keys, kv.values, plan, nets, self.layout, self._angles, pages, fresh)
        return True

    def describe(self) -> dict[str, Any]:
        layout = self.layout
        return identity(self._checkpoint.path) | {
            "factor": layout.factor,
            "n_sink": layout.n_sink,
            "recent": layout.recent,
            "unused": len(self._checkpoint.unused),
        }


def _kernel(nets: Mapping[str, Net], fit: ModelFit) -> Callable[..., None] | None:
    """`merge_triton.merge_into_pages` where it fits the networks and the device."""
    if fit.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from fastcache.compression import merge_triton

    return merge_triton.merge_into_pages if merge_triton.takes(fit.dtype, fit.head_dim, nets) else None
