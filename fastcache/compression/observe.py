"""What some methods want to know of all queries of a prompt: the attention they pay, and how they are distributed.

Queries and keys are padded like everything a method sees: (B, H, T, d) and (B, Hk, T, d), rotated, sequence b of
`lengths[b]` entries from position 0 on. Nothing here waits for the device or holds a matrix of T x T.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 256  # whose weights are held at once


def attention_mass(queries: Tensor, keys: Tensor, lengths: Tensor, lse: Tensor | None = None) -> Tensor:
    """(B, H, T) float32: causal softmax attention of every query, summed over the queries; zero on padding.

    lse: (B, H, T) float32, base 2: the logarithm of each query's softmax denominator, where it is known already.
    This reference computes its own.
    """
    batch, heads, padded, dim = queries.shape
    position = torch.arange(padded, device=keys.device)
    valid = position < lengths[:, None]  # (B, T)
    keys = keys.float().masked_fill(~valid[:, None, :, None], 0.0)
    mass = torch.zeros((batch, heads, padded), dtype=torch.float32, device=keys.device)
    for start in range(0, padded, QUERIES):
        rows = slice(start, min(start + QUERIES, padded))
        some = queries[:, :, rows].float().unflatten(1, (keys.shape[1], -1))
        logits = some @ keys[:, :, None].transpose(-1, -2) * dim**-0.5  # (B, Hk, G, rows, T)
        weights = logits.masked_fill(position > position[rows, None], -torch.inf).softmax(-1)
        weights = weights.masked_fill(~valid[:, None, None, rows, None], 0.0)
        mass += weights.sum(3).flatten(1, 2)
    return mass


def weight_bytes(sequences: int, heads: int, longest: int) -> int:
    """What `attention_mass` holds of weights at once, with the logits they are made of."""
    return 2 * sequences * heads * min(QUERIES, longest) * longest * torch.float32.itemsize


def query_statistics(queries: Tensor, lengths: Tensor, cos_sin: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Mean (B, H, d) and covariance (B, H, d, d), float32, of the unrotated queries from position `first` on.

    cos_sin: (max_positions, 2, d / 2), by which queries were rotated and are rotated back here.
    """
    padded = queries.shape[2]
    position = torch.arange(padded, device=queries.device)
    counted = ((position >= first) & (position < lengths[:, None]))[:, None, :, None]
    cos, sin = cos_sin[:padded].unbind(1)
    one, other = queries.float().chunk(2, dim=-1)
    unrotated = torch.cat([one * cos + other * sin, other * cos - one * sin], dim=-1)
    count = (lengths - first).clamp(min=1)[:, None, None]
    mean = unrotated.masked_fill(~counted, 0.0).sum(2) / count
    centred = (unrotated - mean[:, :, None]).masked_fill(~counted, 0.0)
    return mean, centred.transpose(-1, -2) @ centred / count[..., None]
