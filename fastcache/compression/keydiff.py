"""KeyDiff: keys that point elsewhere than the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fastcache.compression.base import EvictionMethod, LayerKV


@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictionMethod):
    """Keep the entries whose key is least similar to the mean direction of all keys of its head.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv:2504.15364. The paper evicts block by block while it prefills; here,
    as in kvpress, once over the whole prompt.
    """

    name: ClassVar[str] = "keydiff"

    def importance(self, kv: LayerKV) -> Tensor:
        """(B, Hk, T) float32: minus the cosine between the key and the mean of the normalised keys.

        In float32 even for bfloat16 keys, where close cosines would tie.
        """
        directions = F.normalize(kv.keys.float(), dim=-1).masked_fill(~kv.valid[..., None], 0.0)
        # The mean's length changes no cosine, so the sum serves.
        anchor = F.normalize(directions.sum(2, keepdim=True), dim=-1)
        return -(directions @ anchor.transpose(-1, -2)).squeeze(-1)
