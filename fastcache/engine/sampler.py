"""From logits to token ids, on the device, without a host synchronisation.

Random draws use noise that is a hash of (request seed, output index, token id): the same request draws the
same tokens whatever batch it runs in, and on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcache.config import SamplingParams
from fastcache.engine.batch import upload

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of S rows as device tensors; None for a filter no row uses. Greedy rows have temperature 0."""

    temperature: Tensor  # (S,) float32
    top_k: Tensor | None  # (S,) int64, vocabulary size where off
    top_p: Tensor | None  # (S,) float32
    seeds: Tensor  # (S,) int64
    steps: Tensor  # (S,) int64: which output token of its request this is


def sampling_batch(
    params: list[SamplingParams], seeds: list[int], steps: list[int], device: torch.device
) -> SamplingBatch | None:
    """None when every row is greedy."""
    if all(p.greedy for p in params):
        return None

    def tensor(values: list, dtype: type) -> Tensor:
        return upload([np.asarray(values, dtype)], device)[0]

    return SamplingBatch(
        temperature=tensor([p.temperature for p in params], np.float32),
        top_k=tensor([p.top_k or 2**31 for p in params], np.int64) if any(p.top_k for p in params) else None,
        top_p=tensor([p.top_p for p in params], np.float32) if any(p.top_p < 1 for p in params) else None,
        seeds=tensor(seeds, np.int64),
        steps=tensor(steps, np.int64),
    )


def sample(logits: Tensor, batch: SamplingBatch | None) -> Tensor:
    """logits: (S, V), any float dtype. Returns (S,) int64."""
    if batch is None:
        return logits.argmax(dim=-1)
    logits = logits.float()
    greedy = batch.temperature == 0
    scaled = logits / torch.where(greedy, 1.0, batch.temperature)[:, None]
    scaled = _filter(scaled, batch)
    # Gumbel-max: argmax(log p + g) draws from p when g = -log(-log u).
    noise = -torch.log(-torch.log(_uniform(batch.seeds, batch.steps, logits.shape[1])))
    drawn = (scaled + noise).argmax(dim=-1)
    return torch.where(greedy, logits.argmax(dim=-1), drawn)


def _filter(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Drop tokens outside the top k, then outside the smallest set whose mass reaches top p."""
    if batch.top_k is None and batch.top_p is None:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if batch.top_k is not None:
        drop |= rank >= batch.top_k[:, None]
    if batch.top_p is not None:
        probabilities = ordered.masked_fill(drop, -torch.inf).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        drop |= before >= batch.top_p[:, None]
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -torch.inf)


def _uniform(seeds: Tensor, steps: Tensor, vocab: int) -> Tensor:
    """(S, vocab) float32 in (0, 1), a hash of its three coordinates."""
    row = _mix(_mix(seeds & _MASK) ^ (seeds >> 32 & _MASK) ^ _mix(steps + 0x9E3779B9))
    token = torch.arange(vocab, device=seeds.device)
    bits = _mix(row[:, None] ^ _mix(token + 0x85EBCA6B)[None])
    return ((bits >> 8).float() + 0.5) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (two xor-shift-multiply rounds, constants of C. Wellons' lowbias32) in int64."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
