"""Perplexity of the true continuation over caches that different methods left, all of the same size.

Every method gets exactly the entries that the merging compressor keeps, so what differs is what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV, select
from fastcache.training.frozen import Cache, FrozenModel, Teacher

Compress = Callable[[Teacher], list[Cache]]


@torch.no_grad()
def continuation_quality(
    frozen: FrozenModel,
    windows: Tensor,
    context: int,
    methods: Mapping[str, Compress],
    batch_size: int,
    window: int,
) -> dict[str, dict[str, Any]]:
    """Per method, and for the full cache: `perplexity` of the continuation, `kl` from the full cache in nats,
    `agreement` of the likeliest token with it, and `kept` entries.

    windows: (M, N + C) int64. `window`: last queries the methods may ask for.
    """
    sums: dict[str, dict[str, float]] = {}
    kept: dict[str, int] = {}
    tokens = 0
    for ids in windows.split(batch_size):
        teacher = frozen.teacher(ids, context, window)
        full = teacher.logits.float().log_softmax(-1)
        # The teacher's row i predicts token i + 1, so the last row has no target here.
        targets = ids[:, context + 1 :].flatten()
        tokens += targets.numel()
        for name, compress in {"full": lambda t: t.caches, **methods}.items():
            caches = compress(teacher)
            kept[name] = caches[0][0].shape[2]
            _, logits = frozen.student(ids[:, context:], context, caches)
            ours = logits.float().log_softmax(-1)
            parts = sums.setdefault(name, dict.fromkeys(("nll", "kl", "agreement"), 0.0))
            rows = ours.unflatten(0, (len(ids), -1))[:, :-1].flatten(0, 1)
            parts["nll"] += float(F.nll_loss(rows, targets, reduction="sum"))
            parts["kl"] += (
                float(F.kl_div(ours, full, reduction="sum", log_target=True)) / len(ours) * len(targets)
            )
            parts["agreement"] += float((ours.argmax(-1) == full.argmax(-1)).float().mean()) * len(targets)
    return {
        name: {
            "kept": kept[name],
            "perplexity": round(float(torch.tensor(parts["nll"] / tokens).exp()), 4),
            "kl": round(parts["kl"] / tokens, 5),
            "agreement": round(parts["agreement"] / tokens, 5),
        }
        for name, parts in sums.items()
    }


def eviction(method: EvictionMethod, kept: int) -> Compress:
    """An eviction method that leaves `kept` entries per KV head. Needs keys, values and window queries at most."""

    def compress(teacher: Teacher) -> list[Cache]:
        out = []
        for layer, (keys, values) in enumerate(teacher.caches):
            lengths = torch.full((len(keys),), keys.shape[2], device=keys.device)
            budgets = torch.full_like(lengths, kept)
            queries = teacher.queries[layer][:, :, -method.window :] if method.window else None
            kv = LayerKV(layer, len(teacher.caches), keys, values, lengths, budgets, window_queries=queries)
            index = select(method.score(kv), lengths, budgets, kept)[..., None].expand(
                -1, -1, -1, keys.shape[3]
            )
            out.append((keys.gather(2, index), values.gather(2, index)))
        return out

    return compress
