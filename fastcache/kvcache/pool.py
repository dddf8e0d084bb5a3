"""The KV pool: two tensors, keys and values, shaped (layers, pages, kv_heads, page_size, head_dim).

Heads come before the page's slots, so that one (page, head) is contiguous: the whole pool can also be read as
`layers * pages * kv_heads` single-head pages, which is what per-head budgets address.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """What one token stores. Sizes in entries; byte counts are of keys and values together.

    dtype: what the model computes in. stored: what the pool holds, by default the same; or float8_e4m3fn, which
    is cast to without a scale, clamped to its largest value. rated: a method's rating of each entry (compression/
    states.py) stands beside it, one float32 per KV head.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    stored: torch.dtype = None
    rated: bool = False

    def __post_init__(self) -> None:
        if self.stored is None:
            object.__setattr__(self, "stored", self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """What a token's keys and values take in the pool, all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.stored.itemsize

    @property
    def slot_bytes(self) -> int:
        """What a slot of the pool takes, all layers: keys, values and, where there are any, ratings."""
        ratings = self.num_layers * self.kv_heads * torch.float32.itemsize if self.rated else 0
        return self.bytes_per_token + ratings

    @property
    def layer_bytes(self) -> int:
        """What a token's keys and values of one layer take as the model computes them."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


def to_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as the pool stores it: values beyond the largest of an 8-bit type become that one, never NaN."""
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def as_bytes(x: Tensor) -> Tensor:
    """An 8-bit `x` as bytes, which every torch can index and every GPU copies; anything else as it is."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


@functools.cache
def _every_byte(dtype: torch.dtype) -> Tensor:
    """The 256 numbers of an 8-bit type."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored entries in the model's type. On the CPU 8 bits are looked up: torch widens them one by one."""
    if x.dtype.itemsize == 1 and x.device.type == "cpu":
        numbers = _every_byte(x.dtype).index_select(0, as_bytes(x).flatten().int())
        return numbers.view(x.shape).to(dtype)
    return x.to(dtype)


def gather_pages(pages: Tensor, page_table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(B, kv_heads, length, head_dim) in `dtype`: the first entries of B sequences, padded with whatever their last
    pages hold.

    pages: one layer's keys or values, (P, kv_heads, page_size, head_dim). page_table: (B, max_pages) int.
    """
    table = page_table[:, : -(-length // pages.shape[2])].long()
    found = as_bytes(pages)[table].view(pages.dtype)  # (B, num_pages, kv_heads, page_size, head_dim)
    return widened(found, dtype).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty: rows read past a sequence's end are masked, and a NaN there would survive masking.

    On the CPU numpy's zeros are pages the kernel hands out when first touched: an idle pool costs nothing.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, np.uint8)).view(dtype).view(size)
    return torch.zeros(size, dtype=dtype, device=device)


@dataclass(frozen=True)
class KVPlace:
    """Where one layer's new entries go: its pages (P, kv_heads, page_size, head_dim) and a slot per token, (T,) int64,
    -1 for entries that are not stored."""

    keys: Tensor
    values: Tensor
    slots: Tensor


class KVPool:
    """Storage for `num_pages` pages of `page_size` slots each."""

    def __init__(self, shape: KVShape, num_pages: int, page_size: int, device: torch.device) -> None:
        self.shape, self.num_pages, self.page_size, self.device = shape, num_pages, page_size, device
        size = (shape.num_layers, num_pages, shape.kv_heads, page_size, shape.head_dim)
        self.keys, self.values = _zeros(size, shape.stored, device), _zeros(size, shape.stored, device)
        # A page's ratings are as good as its entries: shared with it, and written again when they are.
        ratings = (shape.num_layers, num_pages, page_size, shape.kv_heads)
        self.ratings = _zeros(ratings, torch.float32, device) if shape.rated else None
        self._write_fast, self._gather = None, gather_pages
        if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            from fastcache.kvcache import gather_triton, write_triton

            self._write_fast, self._gather = write_triton.write_kv, gather_triton.gather_pages

    @property
    def page_bytes(self) -> int:
        return self.shape.slot_bytes * self.page_size

    def as_one_layer(self) -> KVPool:
        """The same storage as a single layer, whose page l * num_pages + p is page p of layer l here."""
        flat = copy.copy(self)
        flat.shape = replace(self.shape, num_layers=1)
        flat.num_pages = self.shape.num_layers * self.num_pages
        flat.keys, flat.values = self.keys.flatten(0, 1)[None], self.values.flatten(0, 1)[None]
        flat.ratings = None if self.ratings is None else self.ratings.flatten(0, 1)[None]
        return flat

    def place(self, layer: int, slot_mapping: Tensor) -> KVPlace:
        return KVPlace(self.keys[layer], self.values[layer], slot_mapping)

    def write(self, layer: int, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        """Store new entries, except those whose slot is -1.

        keys, values: (T, kv_heads, head_dim), model dtype; slot_mapping: (T,) int64.
        """
        if self._write_fast is not None:
            self._write_fast(self.keys[layer], self.values[layer], keys, values, slot_mapping)
            return
        slot_mapping = slot_mapping.clamp(min=0)  # slot 0 is on the scratch page, which nobody reads
        pages, offsets = slot_mapping // self.page_size, slot_mapping % self.page_size
        for pool, new in ((self.keys, keys), (self.values, values)):
            as_bytes(pool[layer])[pages, :, offsets] = as_bytes(to_stored(new, pool.dtype))

    def gather(self, layer: int, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of B sequences, each as `gather_pages` in the model's dtype."""
        return self.gather_keys(layer, page_table, length), self.gather_values(layer, page_table, length)

    def gather_keys(self, layer: int, page_table: Tensor, length: int) -> Tensor:
        return self._gather(self.keys[layer], page_table, length, self.shape.dtype)

    def gather_values(self, layer: int, page_table: Tensor, length: int) -> Tensor:
        return self._gather(self.values[layer], page_table, length, self.shape.dtype)

    def shaped(self, batch: int, length: int) -> Tensor:
        """What has the shape of gathered keys, without their content."""
        return self.keys[0, :1, :, :1].expand(batch, -1, length, -1)

    def write_ratings(self, layer: int, ratings: Tensor, slot_mapping: Tensor) -> None:
        """Store ratings (T, kv_heads) float32 beside their entries, except those whose slot, (T,), is -1."""
        self.ratings[layer].flatten(0, 1)[slot_mapping.clamp(min=0)] = ratings  # slot 0: as in `write`

    def gather_ratings(self, layer: int, page_table: Tensor, length: int) -> Tensor:
        """As `gather`: (B, kv_heads, length) float32."""
        table = page_table[:, : -(-length // self.page_size)].long()
        return self.ratings[layer][table].flatten(1, 2)[:, :length].transpose(1, 2)

    def read_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Entries by their row, the pool read as (-1, head_dim). Returns two (*rows.shape, head_dim), model dtype."""
        return tuple(
            widened(as_bytes(pool.view(-1, self.shape.head_dim))[rows].view(pool.dtype), self.shape.dtype)
            for pool in (self.keys, self.values)
        )

    def write_rows(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store entries by their row. keys, values: (*rows.shape, head_dim), model dtype."""
        for pool, new in ((self.keys, keys), (self.values, values)):
            flat = as_bytes(pool.view(-1, self.shape.head_dim))
            flat[rows] = as_bytes(to_stored(new, pool.dtype))

    def copy_rows(self, source: Tensor, target: Tensor) -> None:
        """Copy entries within the pool, by their rows: any two tensors of one shape, int64."""
        for pool in (self.keys, self.values):
            flat = as_bytes(pool.view(-1, self.shape.head_dim))
            flat[target] = flat[source]

    def write_kept(self, layer: int, keys: Tensor, values: Tensor, page_table: Tensor) -> None:
        """Store whole caches of B sequences from slot 0 of their pages on.

        keys, values: (B, kv_heads, K, head_dim), model dtype, K a multiple of page_size.
        page_table: (B, K / page_size), with the scratch page where a sequence has fewer pages.
        """
        b, heads, _, dim = keys.shape
        table = page_table.long()
        for pool, new in ((self.keys, keys), (self.values, values)):
            pages = to_stored(new, pool.dtype).view(b, heads, table.shape[1], self.page_size, dim)
            as_bytes(pool[layer])[table] = as_bytes(pages).transpose(1, 2)
