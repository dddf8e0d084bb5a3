"""Random inputs for compression methods, and the slow, obvious version of what `select` does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastcache.compression.base import EvictionMethod, LayerKV

# A method's needs, and the fields of LayerKV that satisfy them.
FIELDS = {
    "keys": ("keys",),
    "values": ("values",),
    "window_queries": ("window_queries",),
    "attention_mass": ("attention_mass",),
    "replay_scores": ("replay_scores",),
    "hidden_states": ("ratings",),
    "query_stats": ("query_mean", "query_cov", "inv_freq"),
}


def random_layer(
    method: EvictionMethod,
    lengths: list[int],
    budgets: list[int],
    heads: int = 6,
    kv_heads: int = 2,
    size: int = 16,
    seed: int = 0,
    padding: float = float("nan"),
) -> LayerKV:
    """A layer with every field filled. Row b depends on `seed` and `lengths[b]` only."""
    rows = [_random_row(method, n, heads, kv_heads, size, seed) for n in lengths]
    longest = max(lengths)

    def stack(name: str, dim: int | None) -> Tensor:
        tensors = [row[name] for row in rows]
        if dim is not None:
            tensors = [pad_to(t, longest, dim, padding) for t in tensors]
        return torch.stack(tensors)

    return LayerKV(
        layer=1,
        num_layers=2,
        keys=stack("keys", 1),
        values=stack("values", 1),
        lengths=torch.tensor(lengths),
        budgets=torch.tensor(budgets),
        window_queries=stack("window_queries", None),
        attention_mass=stack("attention_mass", 1),
        replay_scores=stack("replay_scores", 1),
        ratings=stack("ratings", 1),
        query_mean=stack("query_mean", None),
        query_cov=stack("query_cov", None),
        inv_freq=10_000.0 ** -(torch.arange(size // 2) / (size // 2)),
    )


def _random_row(
    method: EvictionMethod, length: int, heads: int, kv_heads: int, size: int, seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    queries = torch.randn(heads, max(2, method.window), size, generator=generator)
    centred = torch.randn(heads, 2 * size, size, generator=generator)
    return {
        "keys": torch.randn(kv_heads, length, size, generator=generator),
        "values": torch.randn(kv_heads, length, size, generator=generator),
        "window_queries": queries[:, : method.window],
        "attention_mass": torch.rand(heads, length, generator=generator) * length,
        "query_mean": torch.randn(heads, size, generator=generator),
        "replay_scores": torch.rand(kv_heads, length, generator=generator),
        "ratings": torch.randn(kv_heads, length, generator=generator),
        "query_cov": centred.transpose(1, 2) @ centred / (2 * size),
    }


def pad_to(tensor: Tensor, length: int, dim: int, value: float) -> Tensor:
    """`tensor` with `dim` extended to `length` by `value`."""
    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)


def without(kv: LayerKV, needs: frozenset[str]) -> LayerKV:
    """`kv` as an engine may hand it to a method with these needs: nothing else is given, keys are NaN."""
    dropped = {field: None for need, fields in FIELDS.items() if need not in needs for field in fields}
    if "keys" in dropped:
        dropped["keys"] = torch.full_like(kv.keys, torch.nan)
    return replace(kv, **dropped)


def slow_select(scores: Tensor, lengths: list[int], budgets: list[list[int]]) -> list[list[list[int]]]:
    """Kept positions by sorting each row in Python: highest score first, of equals the earlier position."""
    return [
        [
            sorted(sorted(range(n), key=lambda i, row=row: (-float(row[i]), i))[: min(kept, n)])
            for row, kept in zip(rows, row_budgets, strict=True)
        ]
        for rows, n, row_budgets in zip(scores, lengths, budgets, strict=True)
    ]


def as_lists(kept: Tensor) -> list[list[list[int]]]:
    """`select`'s answer without its -1 padding."""
    return [[[int(i) for i in row if i >= 0] for row in rows] for rows in kept]
