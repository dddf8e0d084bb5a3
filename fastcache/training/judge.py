"""Perplexity of the true continuation over caches that different methods left, all of the same size.

Every method gets exactly the entries that the merging compressor keeps, so what differs is what they hold.
"""

from __future__ import annotations

import math
import statistics
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
    `agreement` of the likeliest token with it, and `kept` entries. `over`: nats per token on the true text more than
    the full cache and than the first of `methods` lose, each with its standard error over windows.

    windows: (M, N + C) int64. `window`: last queries the methods may ask for.
    """
    found: dict[str, dict[str, list[float]]] = {}  # one value per window
    kept: dict[str, int] = {}
    for ids in windows.split(batch_size):
        teacher = frozen.teacher(ids, context, window)
        full = teacher.logits.float().log_softmax(-1)
        for name, compress in {"full": lambda t: t.caches, **methods}.items():
            caches = compress(teacher)
            kept[name] = caches[0][0].shape[2]
            _, logits = frozen.student(ids[:, context:], context, caches)
            lists = found.setdefault(name, {"nll": [], "kl": [], "agreement": []})
            for part, value in _compare(logits.float().log_softmax(-1), full, ids[:, context:]).items():
                lists[part] += value.tolist()
    others = ("full", *list(methods)[:1])
    return {
        name: {
            "kept": kept[name],
            "perplexity": round(math.exp(statistics.fmean(lists["nll"])), 4),
            "over": {other: _excess(lists["nll"], found[other]["nll"]) for other in others},
            "kl": round(statistics.fmean(lists["kl"]), 5),
            "agreement": round(statistics.fmean(lists["agreement"]), 5),
        }
        for name, lists in found.items()
    }


def _compare(ours: Tensor, full: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Log-probabilities (B * C, vocab) of the tokens after ids (B, C), as means per window (B,)."""
    # Row i predicts token i + 1, so the last row has no target here.
    rows = ours.unflatten(0, ids.shape)[:, :-1].flatten(0, 1)
    parts = {
        "nll": F.nll_loss(rows, ids[:, 1:].flatten(), reduction="none"),
        "kl": F.kl_div(ours, full, reduction="none", log_target=True).sum(-1),
        "agreement": (ours.argmax(-1) == full.argmax(-1)).float(),
    }
    return {name: part.view(len(ids), -1).mean(1) for name, part in parts.items()}


def _excess(ours: list[float], theirs: list[float]) -> list[float | None]:
    """Mean of the differences, and its standard error; None for that of a single one."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    many = len(differences) > 1
    error = round(statistics.stdev(differences) / len(differences) ** 0.5, 5) if many else None
    return [round(statistics.fmean(differences), 5), error]


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
