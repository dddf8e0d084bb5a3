"""What test_compression_kernels.py runs under the interpreter: heads of different lengths, against the reference."""

from __future__ import annotations

import kernel_cases  # noqa: F401  makes the interpreter take a loop's bound from newer numpy
import numpy as np
import torch

from fastcache.attention import ragged_triton
from fastcache.attention.base import HeadShape
from fastcache.attention.ragged import RaggedAttention, Rows
from fastcache.attention.torch_sdpa import TorchSDPA
from fastcache.compression import repack, repack_heads_triton
from fastcache.kvcache.head_layout import HeadLayout, HeadRows, LayoutTable, upload_layouts
from fastcache.kvcache.pool import KVPool, KVShape

CPU, LAYERS, PAGE = torch.device("cpu"), 2, 4


def tables_of(pools_pages, layouts, appended, rng):
    """(sequences, longest) page numbers, every page once."""
    pages = iter(rng.permutation(np.arange(1, pools_pages)).tolist())
    counts = [
        layout.pages(more) if layout else -(-more // PAGE)
        for layout, more in zip(layouts, appended, strict=True)
    ]
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(pages) for _ in range(count)]
    return torch.from_numpy(table)


def store_and_attend(heads, kv_heads, size):
    """Long, short and plain caches in one batch; long heads take several splits."""
    rng, ragged_triton.SPLIT_ENTRIES = np.random.default_rng(0), 64
    pool = KVPool(KVShape(LAYERS, kv_heads, size, torch.float32), 200, PAGE, CPU)
    for tensor in (pool.keys, pool.values):
        tensor.normal_()
    kept = [rng.integers(0, longest, (LAYERS, kv_heads)) for longest in (200, 9)]
    layouts, appended = [HeadLayout(kept[0], PAGE), None, HeadLayout(kept[1], PAGE)], [13, 90, 0]
    table = LayoutTable(pool, 4)
    table.sync(range(3), layouts)
    pages = tables_of(200, layouts, [more + 1 for more in appended], rng)
    rows = Rows(torch.arange(3), torch.tensor(appended), pages, 220)
    dense = TorchSDPA(pool, HeadShape(heads, kv_heads, size))
    slow = RaggedAttention(dense, table)
    fast = ragged_triton.RaggedTriton(dense, table, 16, pages.shape[1])
    for layer in range(LAYERS):
        q, before = torch.randn(3, heads, size), (pool.keys.clone(), pool.values.clone())
        k, v = torch.randn(2, 3, kv_heads, size)
        slow._store(layer, k, v, rows)
        want = pool.keys.clone(), pool.values.clone()
        pool.keys.copy_(before[0])
        pool.values.copy_(before[1])
        fast._store(layer, k, v, rows)
        assert torch.equal(pool.keys, want[0]) and torch.equal(pool.values, want[1])
        want, out = slow._attend(layer, q, rows), torch.empty_like(q)
        assert torch.allclose(fast._attend(layer, q, rows), want, atol=1e-5)
        assert fast._attend(layer, q, rows, out) is out and torch.allclose(out, want, atol=1e-5)


def repack_heads():
    rng = np.random.default_rng(1)
    pools = [KVPool(KVShape(LAYERS, 2, 16, torch.float32), 100, PAGE, CPU) for _ in range(2)]
    layouts = [HeadLayout(rng.integers(1, longest, (LAYERS, 2)), PAGE) for longest in (60, 5, 30)]
    packed, pages = upload_layouts(layouts, CPU), tables_of(100, layouts, [0, 0, 0], rng)
    for layer in range(LAYERS):
        k, v = torch.randn(2, 3, 70, 2, 16).transpose(2, 3)
        counts = np.stack([layout.kept[layer] for layout in layouts])
        kept = torch.full((3, 2, int(counts.max())), -1)
        for row, head in np.ndindex(3, 2):
            chosen = np.sort(rng.permutation(70)[: counts[row, head]])
            kept[row, head, : len(chosen)] = torch.from_numpy(chosen)
        heads = HeadRows(packed, layer, 2)
        repack.repack_heads(pools[0], heads, k, v, kept, pages)
        repack_heads_triton.repack_heads(pools[1], heads, k, v, kept, pages)
    for one, other in ((pools[0].keys, pools[1].keys), (pools[0].values, pools[1].values)):
        assert one[:, 1:].any() and torch.equal(one[:, 1:], other[:, 1:])  # page 0 is scratch


if __name__ == "__main__":
    torch.manual_seed(0)
    for shape in ((6, 2, 16), (4, 4, 32), (8, 1, 16)):
        store_and_attend(*shape)
    repack_heads()
